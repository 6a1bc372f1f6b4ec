"""Write what the original packages answer, as the judge of our own chains: golden_magika.json, golden_langid.json.

The project does not depend on those packages. To write the files again, from this folder:

    python3 -m venv /tmp/golden && /tmp/golden/bin/pip install magika==1.0.3 py3langid==0.4.0
    /tmp/golden/bin/python make_golden.py

A case's input is `base64(data) * repeat`. For magika `label` and `score` are the package's output in its default mode
(high confidence) and `raw_label` the network's own word, "undefined" where the rules for few bytes answered. For langid
they are those of `LanguageIdentifier(norm_probs=True, min_confidence=0.05)`, where "und" is undetermined, and `ranking`
has the three best with their probabilities.
"""

# ruff: noqa: E501, PLC0415  # whole files written as literals; the original packages are imported where they are asked

from __future__ import annotations

import base64
import bz2
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import struct
import tarfile
import wave
import zipfile
import zlib
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MIN_CONFIDENCE = 0.05

PYTHON = b'''"""A stack."""

from dataclasses import dataclass, field


@dataclass
class Stack:
    items: list[int] = field(default_factory=list)

    def push(self, item: int) -> None:
        self.items.append(item)

    def pop(self) -> int:
        if not self.items:
            raise IndexError("pop from an empty stack")
        return self.items.pop()
'''
TEXT_FILES: dict[str, bytes] = {
    "python": PYTHON,
    "python, indented far": b"\n" * 300 + b" " * 500 + PYTHON,
    "c": b"#include <stdio.h>\n#include <stdlib.h>\n\nint main(int argc, char **argv) {\n    int *p = malloc(4);\n"
    b'    if (!p) return 1;\n    printf("%d %s\\n", argc, argv[0]);\n    free(p);\n    return 0;\n}\n',
    "cpp": b"#include <iostream>\n#include <vector>\n\ntemplate <typename T>\nclass Box {\n public:\n"
    b"  explicit Box(T v) : v_(std::move(v)) {}\n  const T& get() const { return v_; }\n private:\n  T v_;\n};\n\n"
    b"int main() {\n  std::vector<Box<int>> v;\n  for (auto& b : v) std::cout << b.get() << std::endl;\n}\n",
    "go": b'package main\n\nimport (\n\t"fmt"\n\t"os"\n)\n\nfunc main() {\n\tif len(os.Args) < 2 {\n'
    b'\t\tfmt.Fprintln(os.Stderr, "usage")\n\t\tos.Exit(2)\n\t}\n\tfor i, a := range os.Args[1:] {\n'
    b"\t\tfmt.Println(i, a)\n\t}\n}\n",
    "rust": b"use std::collections::HashMap;\n\n#[derive(Debug, Clone)]\npub struct Entry<'a> {\n    name: &'a str,\n}\n\n"
    b"impl<'a> Entry<'a> {\n    pub fn new(name: &'a str) -> Self {\n        Self { name }\n    }\n}\n\n"
    b'fn main() {\n    let mut m: HashMap<u32, Entry> = HashMap::new();\n    m.insert(1, Entry::new("a"));\n'
    b'    println!("{:?}", m.get(&1).unwrap());\n}\n',
    "java": b"package org.example;\n\nimport java.util.List;\n\npublic final class Main {\n"
    b"    public static void main(String[] args) {\n        List<String> all = List.of(args);\n"
    b"        for (String s : all) {\n            System.out.println(s);\n        }\n    }\n}\n",
    "javascript": b"'use strict';\nconst fs = require('fs');\n\nmodule.exports = async function load(path) {\n"
    b"  const text = await fs.promises.readFile(path, 'utf8');\n  return JSON.parse(text).map((x) => x.id);\n};\n",
    "typescript": b"export interface Point {\n  readonly x: number;\n  readonly y?: number;\n}\n\n"
    b"export function norm(p: Point): number {\n  const { x, y = 0 } = p;\n  return Math.sqrt(x * x + y * y);\n}\n",
    "ruby": b"require 'set'\n\nmodule Shop\n  class Cart\n    attr_reader :items\n\n    def initialize\n"
    b"      @items = Set.new\n    end\n\n    def add(item)\n      @items << item unless item.nil?\n      self\n    end\n"
    b"  end\nend\n\nputs Shop::Cart.new.add(:book).items.map(&:to_s).join(', ')\n",
    "php": b"<?php\nnamespace App;\n\nclass User {\n    private $name;\n    public function __construct(string $name) {\n"
    b'        $this->name = $name;\n    }\n    public function hello() {\n        echo "Hello {$this->name}\\n";\n    }\n}\n',
    "shell": b'#!/bin/sh\nset -eu\n\nfor f in "$@"; do\n  if [ ! -f "$f" ]; then\n    echo "no file $f" >&2\n    exit 1\n'
    b'  fi\n  gzip -9 "$f"\ndone\n',
    "powershell": b"param([string]$Path = '.')\n\nGet-ChildItem -Path $Path -Recurse | Where-Object { $_.Length -gt 1MB } |\n"
    b"  Sort-Object Length -Descending | ForEach-Object { Write-Host $_.FullName $_.Length }\n",
    "sql": b"CREATE TABLE orders (\n  id INTEGER PRIMARY KEY,\n  customer_id INTEGER NOT NULL REFERENCES customers(id),\n"
    b"  total NUMERIC(10, 2) DEFAULT 0\n);\n\nSELECT c.name, SUM(o.total) AS total FROM orders o\n"
    b"JOIN customers c ON c.id = o.customer_id WHERE o.total > 10 GROUP BY c.name ORDER BY total DESC;\n",
    "html": b'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>Hi</title></head>\n<body>\n'
    b'<h1>Hello</h1>\n<p class="a">A paragraph with a <a href="/x">link</a>.</p>\n</body>\n</html>\n',
    "css": b"body {\n  margin: 0;\n  font: 16px/1.4 sans-serif;\n}\n\n.card > h2:hover {\n  color: #336699;\n"
    b"  transition: color .2s ease-in;\n}\n\n@media (max-width: 600px) { .card { display: none; } }\n",
    "json": json.dumps(
        {"name": "gateway", "ports": [8001, 8002], "nested": {"on": True, "x": None}}, indent=2
    ).encode(),
    "jsonl": b'{"id": 1, "text": "first line"}\n{"id": 2, "text": "second line"}\n{"id": 3, "text": "third line"}\n',
    "yaml": b"apiVersion: apps/v1\nkind: Deployment\nmetadata:\n  name: triton\nspec:\n  replicas: 2\n  template:\n"
    b'    spec:\n      containers:\n        - name: triton\n          image: triton:latest\n          args: ["--strict"]\n',
    "toml": b'[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n\n[project]\nname = "x"\n'
    b'version = "0.1.0"\ndependencies = ["numpy>=1"]\n\n[tool.ruff]\nline-length = 120\n',
    "ini": b"[DEFAULT]\nlevel = info\n\n[database]\nhost = localhost\nport = 5432\nuser = app\n; a remark\n",
    "xml": b'<?xml version="1.0" encoding="UTF-8"?>\n<catalog>\n  <book id="1"><title>A</title><price>3.5</price></book>\n'
    b'  <book id="2"><title>B</title><price>4.5</price></book>\n</catalog>\n',
    "csv": b"id,name,price\n" + b"".join(b"%d,item %d,%d.50\n" % (i, i, i * 3) for i in range(40)),
    "markdown": b"# Title\n\nSome *text* with a [link](http://example.org).\n\n## List\n\n- one\n- two\n\n"
    b"```python\nprint(1)\n```\n\n| a | b |\n| - | - |\n| 1 | 2 |\n",
    "makefile": b".PHONY: all clean\n\nCFLAGS := -O2 -Wall\n\nall: main\n\nmain: main.o util.o\n\t$(CC) -o $@ $^\n\n"
    b"%.o: %.c\n\t$(CC) $(CFLAGS) -c $<\n\nclean:\n\trm -f *.o main\n",
    "dockerfile": b"FROM python:3.11-slim AS build\nWORKDIR /app\nCOPY requirements.txt .\nRUN pip install -r requirements.txt\n"
    b'COPY . .\nEXPOSE 8080\nENTRYPOINT ["python", "-m", "app"]\n',
    "diff": b"diff --git a/x.py b/x.py\nindex 83db48f..bf269f4 100644\n--- a/x.py\n+++ b/x.py\n@@ -1,3 +1,3 @@\n"
    b" import os\n-print(1)\n+print(2)\n \n",
    "latex": b"\\documentclass{article}\n\\usepackage{amsmath}\n\\begin{document}\n\\section{Intro}\nLet $x^2 = 2$.\n"
    b"\\begin{equation}\n  \\int_0^1 f(x)\\,dx = 1\n\\end{equation}\n\\end{document}\n",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"><circle cx="5" cy="5" r="4" fill="red"/></svg>\n',
    "proto": b'syntax = "proto3";\n\npackage a.v1;\n\nmessage Point {\n  int32 x = 1;\n  repeated string names = 2;\n}\n\n'
    b"service S {\n  rpc Get(Point) returns (Point);\n}\n",
    "prose": b"The quick brown fox jumps over the lazy dog, again and again, until the evening comes.\n" * 6,
    "prose in German": "Über allen Gipfeln ist Ruh, in allen Wipfeln spürest du kaum einen Hauch.\n".encode() * 4,
    "random letters": bytes(97 + (i * i * 7919 + i * 31) % 26 for i in range(900)),
}


def _png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes((x * y) % 256 for x in range(96)) for y in range(32))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def _zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a.py", "b/c.txt"):
            archive.writestr(zipfile.ZipInfo(name), PYTHON)
    return out.getvalue()


def _tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        info = tarfile.TarInfo("folder/stack.py")
        info.size = len(PYTHON)
        archive.addfile(info, io.BytesIO(PYTHON))
    return out.getvalue()


def _sqlite() -> bytes:
    with sqlite3.connect(":memory:") as db:
        db.execute("PRAGMA page_size=1024")
        db.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, name TEXT)")
        db.executemany("INSERT INTO t (name) VALUES (?)", [(f"row {i}",) for i in range(50)])
        db.commit()
        return bytes(db.serialize())


def _wav() -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(b"".join(struct.pack("<h", (i * 400) % 20000 - 10000) for i in range(1500)))
    return out.getvalue()


PDF = (
    b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog /Pages 2 0 R >>\nendobj\n2 0 obj\n<< /Type /Pages /Kids [3 0 R] /Count 1 >>\n"
    b"endobj\n3 0 obj\n<< /Type /Page /Parent 2 0 R /MediaBox [0 0 200 200] >>\nendobj\nxref\n0 4\n0000000000 65535 f \n"
    b"trailer\n<< /Size 4 /Root 1 0 R >>\nstartxref\n190\n%%EOF\n"
)
GIF = b"GIF89a\x01\x00\x01\x00\x80\x00\x00\xff\xff\xff\x00\x00\x00!\xf9\x04\x01\x00\x00\x00\x00,\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02D\x01\x00;"
BINARY_FILES: dict[str, bytes] = {
    "png": _png(),
    "gif": GIF,
    "zip": _zip(),
    "tar": _tar(),
    "gzip": gzip.compress(PYTHON, mtime=0),
    "bzip2": bz2.compress(PYTHON),
    "xz": lzma.compress(PYTHON),
    "pdf": PDF,
    "sqlite": _sqlite(),
    "wav": _wav(),
    "pickle": pickle.dumps({"weights": [float(i) for i in range(60)], "name": "model"}, protocol=4),
    "elf": b"\x7fELF\x02\x01\x01"
    + b"\0" * 9
    + struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 64, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    + bytes((i * 37) % 256 for i in range(700)),
    "all bytes": bytes(range(256)) * 3,
    "wasm": b"\0asm\x01\0\0\0\x01\x07\x01\x60\x02\x7f\x7f\x01\x7f\x03\x02\x01\0\x07\x07\x01\x03add\0\0\x0a\x09\x01\x07\0\x20\0\x20\x01\x6a\x0b",
}
FEW_BYTES: dict[str, bytes] = {
    "empty": b"",
    "one letter": b"a",
    "seven bytes": b"abcdefg",
    "eight bytes": b"abcdefgh",
    "seven bytes, not UTF-8": b"\xff\xfe\x00\x80\x81\x82\x83",
    "spaces only": b" \t\r\n" * 100,
    "seven letters among spaces": b" " * 50 + b"abcdefg" + b" " * 50,
    "seven bytes among spaces, not UTF-8": b" " * 50 + b"\xff\xfe\xfd\xfc\xfb\xfa\xf9" + b" " * 50,
    "five thousand spaces, then a program": b" " * 5000 + PYTHON,
    "a program, then five thousand spaces": PYTHON + b" " * 5000,
    "zeroes": b"\0" * 64,
}
SIZES: dict[str, bytes] = {
    f"python of {size} bytes": (PYTHON * (size // len(PYTHON) + 1))[:size]
    for size in (20, 100, 1023, 1024, 1025, 2048, 4095, 4096, 4097)
}
MAGIKA: dict[str, bytes] = {**TEXT_FILES, **BINARY_FILES, **FEW_BYTES, **SIZES}
LARGE: dict[str, tuple[bytes, int]] = {
    "python of a megabyte": (PYTHON, 2500),
    "csv of a megabyte": (TEXT_FILES["csv"], 1500),
    "zeroes of a megabyte": (b"\0", 1_000_000),
}

LANGID: dict[str, str] = {
    "English": "The ship left the harbour at dawn, and nobody on board knew how long the voyage would take.",
    "German": "Das Schiff verließ den Hafen bei Tagesanbruch, und niemand an Bord wusste, wie lange die Reise dauert.",
    "French": "Le navire a quitté le port à l'aube, et personne à bord ne savait combien de temps durerait le voyage.",
    "Spanish": "El barco salió del puerto al amanecer y nadie a bordo sabía cuánto tiempo duraría el viaje.",
    "Portuguese": "O navio deixou o porto ao amanhecer e ninguém a bordo sabia quanto tempo duraria a viagem.",
    "Italian": "La nave lasciò il porto all'alba e nessuno a bordo sapeva quanto sarebbe durato il viaggio.",
    "Dutch": "Het schip verliet de haven bij zonsopgang en niemand aan boord wist hoe lang de reis zou duren.",
    "Danish": "Skibet forlod havnen ved daggry, og ingen om bord vidste, hvor længe rejsen ville vare.",
    "Swedish": "Fartyget lämnade hamnen i gryningen och ingen ombord visste hur lång tid resan skulle ta.",
    "Norwegian": "Skipet forlot havnen ved daggry, og ingen om bord visste hvor lenge reisen ville vare.",
    "Finnish": "Laiva lähti satamasta aamunkoitteessa, eikä kukaan tiennyt, kuinka kauan matka kestäisi.",
    "Estonian": "Laev lahkus sadamast koidikul ja keegi pardal ei teadnud, kui kaua reis kestab.",
    "Polish": "Statek opuścił port o świcie i nikt na pokładzie nie wiedział, jak długo potrwa podróż.",
    "Czech": "Loď opustila přístav za úsvitu a nikdo na palubě nevěděl, jak dlouho bude cesta trvat.",
    "Slovak": "Loď opustila prístav za úsvitu a nikto na palube nevedel, ako dlho bude cesta trvať.",
    "Hungarian": "A hajó hajnalban hagyta el a kikötőt, és a fedélzeten senki sem tudta, meddig tart az út.",
    "Romanian": "Nava a părăsit portul în zori și nimeni de la bord nu știa cât va dura călătoria.",
    "Turkish": "Gemi şafakta limandan ayrıldı ve gemideki hiç kimse yolculuğun ne kadar süreceğini bilmiyordu.",
    "Russian": "Корабль покинул порт на рассвете, и никто на борту не знал, сколько продлится путешествие.",
    "Ukrainian": "Корабель залишив порт на світанку, і ніхто на борту не знав, скільки триватиме подорож.",
    "Bulgarian": "Корабът напусна пристанището на разсъмване и никой на борда не знаеше колко ще продължи пътуването.",
    "Serbian, Cyrillic": "Брод је напустио луку у зору и нико на броду није знао колико ће путовање трајати.",
    "Serbian, Latin": "Brod je napustio luku u zoru i niko na brodu nije znao koliko će putovanje trajati.",
    "Croatian": "Brod je napustio luku u zoru i nitko na brodu nije znao koliko će dugo putovanje trajati.",
    "Greek": "Το πλοίο έφυγε από το λιμάνι την αυγή και κανείς δεν ήξερε πόσο θα διαρκούσε το ταξίδι.",
    "Arabic": "غادرت السفينة الميناء عند الفجر، ولم يكن أحد على متنها يعرف كم ستستغرق الرحلة.",
    "Hebrew": "הספינה עזבה את הנמל עם שחר, ואיש על הסיפון לא ידע כמה זמן יימשך המסע.",
    "Persian": "کشتی در سپیده دم بندر را ترک کرد و هیچ کس نمی دانست سفر چقدر طول خواهد کشید.",
    "Hindi": "जहाज़ भोर में बंदरगाह से निकला और जहाज़ पर कोई नहीं जानता था कि यात्रा कितनी लंबी होगी।",
    "Bengali": "জাহাজটি ভোরে বন্দর ছেড়ে গেল এবং কেউ জানত না যাত্রা কতক্ষণ চলবে।",
    "Tamil": "கப்பல் விடியற்காலையில் துறைமுகத்தை விட்டு வெளியேறியது.",
    "Thai": "เรือออกจากท่าเรือตอนรุ่งสาง และไม่มีใครบนเรือรู้ว่าการเดินทางจะใช้เวลานานเท่าใด",
    "Chinese": "船在黎明时分离开了港口,船上没有人知道这次航行要持续多久。",
    "Japanese": "船は夜明けに港を出たが、乗っていた誰もその航海がどれくらい続くのか知らなかった。",
    "Korean": "배는 새벽에 항구를 떠났고, 배에 탄 누구도 항해가 얼마나 걸릴지 알지 못했다.",
    "Vietnamese": "Con tàu rời cảng lúc bình minh và không ai trên tàu biết chuyến đi sẽ kéo dài bao lâu.",
    "Indonesian": "Kapal itu meninggalkan pelabuhan saat fajar dan tidak ada yang tahu berapa lama perjalanannya.",
    "Swahili": "Meli iliondoka bandarini alfajiri na hakuna aliyejua safari ingechukua muda gani.",
    "Latin": "Navis prima luce e portu profecta est, neque quisquam sciebat quamdiu iter futurum esset.",
    "Esperanto": "La ŝipo forlasis la havenon ĉe tagiĝo, kaj neniu sciis, kiom longe daŭros la vojaĝo.",
    "Uzbek": "Kema tongda portdan chiqib ketdi va hech kim sayohat qancha davom etishini bilmas edi.",
    "Maltese": "Il-vapur telaq mill-port mas-sebħ u ħadd ma kien jaf kemm se jdum il-vjaġġ.",
    "capitals": "DAS SCHIFF VERLIESS DEN HAFEN BEI TAGESANBRUCH UND NIEMAND WUSSTE WARUM.",
    "capitals and digits": "LE NAVIRE 42 A QUITTÉ LE PORT À L'AUBE",
    "decomposed accents": "Le navire a quitte\u0301 le port a\u0300 l'aube, et personne ne savait ou\u0300 il allait.",
    "two words": "guten Morgen",
    "one word": "hello",
    "one letter": "a",
    "one space": " ",
    "empty": "",
    "digits": "1234567890 42 3.14",
    "marks": "!!! ??? ... ---",
    "emoji": "🚢🌊🌅",
    "mixed": "The ship, das Schiff, le navire, el barco, корабль, 船",
    "a program": PYTHON.decode(),
    "a web address": "https://www.example.org/index.html?q=1",
    "line ends": "première ligne\r\ndeuxième ligne\r\n\ttroisième ligne\r\n",
    "a zero byte": "the ship\x00left the harbour",
}
LANGID_BYTES: dict[str, bytes] = {
    "cut within a letter": "Корабль покинул порт на рассвете".encode()[:-1],
    "Latin-1, not UTF-8": "Le navire a quitté le port à l'aube, où allait-il donc, répétait-il".encode("latin-1"),
    "any bytes": bytes(range(256)),
}
LANGID_LARGE: dict[str, tuple[bytes, int]] = {
    "English, 90 kB": (LANGID["English"].encode() + b" ", 1000),
    "Russian, 150 kB": (LANGID["Russian"].encode() + b" ", 1000),
}


def _inputs(whole: dict[str, bytes], repeated: dict[str, tuple[bytes, int]]) -> list[tuple[str, bytes, int]]:
    return [(name, data, 1) for name, data in whole.items()] + [(name, *pair) for name, pair in repeated.items()]


def _case(name: str, data: bytes, repeat: int, **answer: object) -> dict[str, object]:
    return {"name": name, "data": base64.b64encode(data).decode(), "repeat": repeat, **answer}


def magika_cases() -> list[dict[str, object]]:
    from magika import Magika

    original: Any = Magika()
    cases = []
    for name, data, repeat in _inputs(MAGIKA, LARGE):
        found = original.identify_bytes(data * repeat).prediction
        answer = {"label": str(found.output.label), "score": found.score, "raw_label": str(found.dl.label)}
        cases.append(_case(name, data, repeat, **answer))
    return cases


def langid_cases() -> list[dict[str, object]]:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    original: Any = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=MIN_CONFIDENCE)
    texts = {name: text.encode() for name, text in LANGID.items()}
    cases = []
    for name, data, repeat in _inputs({**texts, **LANGID_BYTES}, LANGID_LARGE):
        label, score = original.classify(data * repeat)
        ranking = original.rank(data * repeat)[:3]
        cases.append(_case(name, data, repeat, label=label, score=score, ranking=ranking))
    return cases


def main() -> None:
    for name, cases in (("golden_magika.json", magika_cases()), ("golden_langid.json", langid_cases())):
        lines = ",\n".join(json.dumps(case) for case in cases)
        (HERE / name).write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        print(name, len(cases), "cases")


if __name__ == "__main__":
    main()
