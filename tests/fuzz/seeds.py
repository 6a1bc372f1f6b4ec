"""Writes the corpora's seeds, from real messages: `python tests/fuzz/seeds.py`. What fuzzing adds lies beside them.

A seed is there for each thing that a reader knows, so that fuzzing begins behind what is hard to guess.
"""

from __future__ import annotations

import gzip
import io
import json
import struct
import zlib
from pathlib import Path

import hpack
import numpy as np
from PIL import Image
from targets import TARGETS, with_tokens
from tritonclient.grpc import service_pb2 as pb

from gateway.v1 import prediction_pb2
from gateway.v2.spec import DATATYPES

ROOT = Path(__file__).parents[2]
CORPUS = Path(__file__).parent / "corpus"

REQUEST = [(":method", "POST"), (":scheme", "http"), (":path", "/inference.GRPCInferenceService/ModelInfer"),
           (":authority", "gateway:8001"), ("te", "trailers"), ("content-type", "application/grpc"),
           ("user-agent", "grpc-python/1.85.1"), ("grpc-timeout", "5S"), ("grpc-accept-encoding", "identity,gzip"),
           ("x-request-id", "abc"), ("key-bin", "AAEC")]  # fmt: skip
RESPONSE = [(":status", "200"), ("content-type", "application/grpc")]
TRAILERS = [("grpc-status", "3"), ("grpc-message", "no%20such%0Amodel"), ("grpc-retry-pushback-ms", "100")]


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def message(body: bytes, flag: int = 0) -> bytes:
    return bytes([flag]) + len(body).to_bytes(4, "big") + body


def counted(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(2, "big") + part for part in parts)


def block(fields: list[tuple[str, str]], huffman: bool = True) -> bytes:
    return hpack.Encoder().encode(fields, huffman=huffman)


def request(**changed: object) -> pb.ModelInferRequest:
    made = pb.ModelInferRequest(model_name="imagenet", model_version="1", id="7", **changed)
    made.parameters["sequence_id"].int64_param = 42
    made.parameters["sequence_start"].bool_param = True
    made.parameters["priority"].uint64_param = 2
    made.parameters["scale"].double_param = 0.5
    made.parameters["note"].string_param = "grün"
    return made


def raw_request() -> pb.ModelInferRequest:
    made = pb.ModelInferRequest(model_name="imagenet")
    made.inputs.add(name="x", datatype="FP32", shape=[2, 3])
    made.inputs.add(name="text", datatype="BYTES", shape=[2, 1])
    made.outputs.add(name="y").parameters["classification"].int64_param = 3
    made.raw_input_contents.append(np.arange(6, dtype=np.float32).tobytes())
    made.raw_input_contents.append(b"\x02\0\0\0hi\0\0\0\0")
    return made


def typed_contents() -> pb.ModelInferRequest:
    made = request()
    made.inputs.add(name="x", datatype="INT32", shape=[1, 4]).contents.int_contents.extend([1, -2, 3, 4])
    made.inputs.add(name="text", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"hello")
    made.inputs.add(name="b", datatype="BOOL", shape=[1]).contents.bool_contents.append(True)
    made.inputs.add(name="f", datatype="FP64", shape=[1]).contents.fp64_contents.append(1.5)
    return made


def shared_memory() -> pb.ModelInferRequest:
    made = pb.ModelInferRequest(model_name="imagenet")
    tensor = made.inputs.add(name="x", datatype="FP32", shape=[1, 3])
    tensor.parameters["shared_memory_region"].string_param = "theirs"
    tensor.parameters["shared_memory_byte_size"].int64_param = 12
    return made


def answer(**changed: object) -> pb.ModelInferResponse:
    made = pb.ModelInferResponse(model_name="efficientnet", model_version="1", **changed)
    made.outputs.add(name="y", datatype="FP32", shape=[2, 2])
    made.outputs.add(name="label", datatype="BYTES", shape=[2, 1])
    made.raw_output_contents.append(np.arange(4, dtype=np.float32).tobytes())
    made.raw_output_contents.append(b"\x03\0\0\0cat\x03\0\0\0dog")
    return made


def final() -> pb.ModelInferResponse:
    made = answer(id="7")
    made.parameters["triton_final_response"].bool_param = True
    return made


def connections() -> dict[str, dict[str, bytes]]:
    head = block(REQUEST)
    unary = frame(1, 4, 1, head) + frame(0, 1, 1, message(raw_request().SerializeToString()))
    stream = b"".join(
        [
            frame(1, 0, 3, head[:20]),
            frame(9, 4, 3, head[20:]),
            frame(0, 8, 3, b"\x02" + message(b"a" * 20) + bytes(2)),
            frame(0, 0, 3, message(b"b" * 300)),
            frame(8, 0, 0, (1000).to_bytes(4, "big")),
            frame(8, 0, 3, (1000).to_bytes(4, "big")),
            frame(0, 1, 3),
        ]
    )
    ends = frame(6, 0, 0, b"12345678") + frame(4, 0, 0, b"\0\x04\0\0\x10\0") + frame(7, 0, 0, bytes(8) + b"bye")
    trailers = frame(1, 5, 1, block(TRAILERS))
    back = frame(1, 4, 3, block(RESPONSE)) + frame(0, 0, 3, message(answer().SerializeToString()))
    packed = [(":method", "POST"), *REQUEST[1:], ("grpc-encoding", "gzip")]
    return {
        "http2_server": {
            "unary": b"\0" + unary,
            "in pieces": b"\x07" + unary,
            "stream": b"\x30" + stream,
            "reset": b"\0" + unary[: len(unary) // 2] + frame(3, 0, 1, b"\0\0\0\x08"),
            "connection": b"\0" + unary + ends,
            "ranked": b"\0" + frame(1, 0x24, 1, b"\0\0\0\x09\x10" + head) + frame(2, 0, 3, b"\0\0\0\x01\x10"),
            "trailers": b"\0" + frame(1, 4, 1, head) + frame(1, 5, 1, block([("x", "y")])),
            "compressed": b"\0"
            + frame(1, 4, 1, block(packed))
            + frame(0, 1, 1, message(gzip.compress(b"x" * 99, mtime=0), 1)),
            "unknown": b"\0" + frame(0xBE, 0, 1, b"x") + unary,
            "settings": b"\0" + frame(4, 0, 0, b"\0\x01\0\0\0\0\0\x05\0\0\x40\0\0\x03\0\0\0\x01") + unary,
        },
        "http2_client": {
            "answers": b"\0" + back + frame(1, 5, 3, block([("grpc-status", "0")])) + trailers,
            "in pieces": b"\x05" + back,
            "refused": b"\0" + frame(3, 0, 1, b"\0\0\0\x07") + trailers,
            "leaves": b"\0" + frame(7, 0, 0, b"\0\0\0\x01\0\0\0\0") + back,
            "http": b"\0" + frame(1, 5, 1, block([(":status", "503"), ("content-type", "text/html")])),
            "hints": b"\0" + frame(1, 4, 1, block([(":status", "100")])) + frame(1, 4, 1, block(RESPONSE)),
            "settings": b"\0" + frame(4, 0, 0, b"\0\x03\0\0\0\x01\0\x06\0\0\x01\0") + frame(6, 1, 0, bytes(8)),
            "pushed": b"\0" + frame(5, 4, 1, b"\0\0\0\x02" + block(REQUEST)),
            "HTTP/1": b"\0HTTP/1.1 400 Bad Request\r\n\r\n",
        },
    }


def headers() -> dict[str, dict[str, bytes]]:
    encoder = hpack.Encoder()
    rows = [encoder.encode(REQUEST), encoder.encode(REQUEST), encoder.encode([("x", "v" * 200)], huffman=False)]
    encoder.header_table_size = 100
    rows.append(encoder.encode(REQUEST))
    marked = [hpack.NeverIndexedHeaderTuple("authorization", "Bearer token")]
    values = [b"5S", b"99999999H", b"0n", b"-1S", b"", b"123456789S", b"AAEC", b"AAE=,AA", b"A", b"a%20b", b"%zz%C3",
              "grün".encode(), b"\xff", b"a\r\nb", b"a\tb", b"1", b" +01x", b"-1", b"9" * 30,
              b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01", b"cc-" + b"1" * 32 + b"-" + b"2" * 16 + b"-00-x",
              ]  # fmt: skip
    names = [b"grpc-timeout", b"x-bin", b"x", b"grpc-message", b"traceparent", b"host", b":authority", b"X", b"", b"te"]
    return {
        "hpack_blocks": {
            "connection": counted(*rows),
            "plain": counted(block(REQUEST, huffman=False)),
            "never indexed": counted(hpack.Encoder().encode(marked)),
            "all codes": counted(block([("x", "".join(map(chr, range(128))))])),
            "indexed": counted(b"\x82\x86\x84\xbe"),
            "integers": counted(b"\x40\x7f\x80\x01", b"\x3f\xe1\x1f"),
        },
        "grpc_fields": {
            **{
                f"name {n}": counted(*(part for value in values for part in (name, value)))
                for n, name in enumerate(names)
            },
            "request": counted(*(text.encode() for field in REQUEST for text in field)),
        },
    }


def messages() -> dict[str, dict[str, bytes]]:
    body = raw_request().SerializeToString()
    requests = [raw_request(), request(), typed_contents(), shared_memory()]
    answers = [answer(), final(), answer(id="x")]
    streamed = [
        pb.ModelStreamInferResponse(infer_response=answer(id="1")),
        pb.ModelStreamInferResponse(infer_response=answer(id="2")),
        pb.ModelStreamInferResponse(infer_response=final(), error_message="no"),
    ]
    rows = [raw_request(), raw_request(), raw_request()]
    for number, row in enumerate(rows):
        row.id = str(number)
    predict = prediction_pb2.PredictRequest(model="imagenet")
    first, second = predict.inputs["x"], predict.inputs["t"]
    first.shape.extend([1, 2])
    first.floats.values.extend([1, 2])
    second.strings.values.append(b"hi")
    predict.inputs["r"].raw = b"\0\0\0\0"
    predict.inputs["r"].datatype = "FP32"
    predict.inputs["r"].shape.append(1)
    predict.inputs["i"].integers.values.extend([-1, 300])
    raws = {
        f"raw {name}": bytes([n, 2])
        + struct.pack(">ii", 1, 2)
        + (b"\x01\0\0\0a\0\0\0\0" if name == "BYTES" else b"\1" * size)
        for n, name in enumerate(DATATYPES)
        for size in [2 * int("".join(filter(str.isdigit, name)) or 8) // 8]
    }
    group = b"\xf3\x01\x08\x01\xf4\x01"  # field 30, a group
    return {
        "grpc_messages": {
            "plain": b"\0" + message(body) + message(b""),
            "gzip": b"\x02" + message(gzip.compress(body, mtime=0), 1),
            "deflate": b"\x03" + message(zlib.compress(body), 1),
            "bomb": b"\x02" + message(gzip.compress(bytes(1 << 20), mtime=0), 1),
            "two streams": b"\x02" + message(gzip.compress(b"a", mtime=0) * 2, 1),
            "unknown": b"\x04" + message(b"x", 1),
            "flag": b"\0" + message(b"x", 2),
        },
        "v2_request": {
            **{f"request {n}": each.SerializeToString() for n, each in enumerate(requests)},
            "late scalars": body + b"\x0a\x05other\x1a\x01i",
            "group": group + body,
            "twice": b"\x0a\x01a" + b"\x12\x012" + body,
        },
        "v2_response": {
            **{f"answer {n}": each.SerializeToString() for n, each in enumerate(answers)},
            "late": answer().SerializeToString() + b"\x0a\x01z" + group,
        },
        "v2_stream": {
            "requests": counted(*(row.SerializeToString() for row in rows)),
            "responses": counted(*(each.SerializeToString() for each in streamed)),
            "the same": counted(body, body, body[:-3]),
        },
        "v2_raw": raws,
        "typed_request": {"all kinds": predict.SerializeToString(), "group": group + predict.SerializeToString()},
    }


def picture(form: str, mode: str = "RGB", **options: object) -> bytes:
    ramp = np.add.outer(np.arange(40), np.arange(60)).astype(np.uint8)
    image = Image.fromarray(np.stack([ramp, ramp[::-1], ramp], axis=-1)).convert(mode)
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def files() -> dict[str, dict[str, bytes]]:
    exif = Image.Exif()
    exif[0x0112] = 6
    plan = b"""experiments:
  weights:
    unit: caller
    control: stable
    treatments: [candidate]
"""
    captured = {"model": "imagenet", "request": "CgVtb2RlbA==", "metadata": {"x": "y"}}
    tricky = b"""a: &x [1, 2]
b: *x
"c": {d: "e\\n", 'f': 0x1f}
? g
: - .inf
  - !tag h
i: |
  text
<<: {j: 1}
a: 1
"""
    examples = {file.stem: file.read_bytes() for file in sorted((ROOT / "deploy" / "examples").glob("*.yaml"))}
    return {
        "config": {
            **{name: text for name, text in examples.items() if len(text) <= 4096},
            "variables": b"upstreams: {a: {endpoints: ['${HOST}:8001', '${NONE:-b}:1']}}\ndirect: {models: all}\n",
            "tricky": tricky,
        },
        "experiments": {"plan": plan},
        "captures": {"two": (json.dumps(captured) + "\n").encode() * 2, "cut": json.dumps(captured).encode()},
        "picture": {
            "jpeg": picture("JPEG", quality=30),
            "progressive": picture("JPEG", quality=30, progressive=True, exif=exif),
            "cmyk": picture("JPEG", "CMYK", quality=20),
            "grey png": picture("PNG", "L"),
            "palette png": picture("PNG", "P", transparency=3),
            "alpha png": picture("PNG", "RGBA"),
            "16 bit png": picture("PNG", "I;16"),
            "webp": picture("WEBP", quality=20),
            "alpha webp": picture("WEBP", "RGBA", lossless=True, exif=exif),
            "gif": picture("GIF"),
        },
    }


def tokens() -> dict[str, dict[str, bytes]]:
    import jwt  # noqa: PLC0415  (comes with an extra)
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415

    key = Ed25519PrivateKey.from_private_bytes(b"\1" * 32)
    claims = {"iss": "https://issuer", "aud": "gateway", "exp": 1 << 33, "sub": "ann", "realm": {"roles": ["a", "b"]}}

    def signed(header: dict[str, object] | None = None, **changed: object) -> bytes:
        return jwt.encode({**claims, **changed}, key, "EdDSA", headers={"kid": "1", **(header or {})}).encode()

    public = {"kty": "OKP", "crv": "Ed25519", "kid": "1", "x": "iojj3XQJ8ZX9UtstPLpdcspnCb8dlBIb83SIAbQPb1w"}
    return {
        "jwt": {
            "good": signed(),
            "expired": signed(exp=1),
            "audience": signed(aud=["other", "gateway"]),
            "not yet": signed(nbf=1 << 33),
            "critical": signed({"crit": ["x"], "x": 1}),
            "no kid": signed({"kid": ""}),
            "odd claims": signed(sub={"a": 1}, realm="x"),
            "groups that are a number": signed(realm={"roles": 5}),
            "groups that are an object": signed(realm={"roles": {"a": 1}}),
            "odd times": signed(exp="8_589_934_592"),
            "secret": jwt.encode(claims, "k" * 32, "HS256").encode(),
            "none": jwt.encode(claims, None, "none").encode(),
            "odd keys": b'{"keys": [{"kty": {}}, {"kty": "RSA", "use": [], "n": 5}, 7, {"kty": "OKP", "kid": []}]}',
            "keys": json.dumps({"keys": [public, {"kty": "RSA", "n": "AQAB", "e": "AQAB"}, {"kty": "EC"}]}).encode(),
        }
    }


def main() -> None:
    made = {**connections(), **headers(), **messages(), **files(), **(tokens() if with_tokens() else {})}
    for name, seeds in made.items():
        assert name in TARGETS
        folder = CORPUS / name
        folder.mkdir(parents=True, exist_ok=True)
        for seed, data in seeds.items():
            (folder / f"seed-{seed.replace(' ', '-').replace('/', '-')}").write_bytes(data)


if __name__ == "__main__":
    main()
