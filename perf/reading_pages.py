"""Twenty pages with text on them, rendered and disturbed as photographs are; the text is what reading is judged by.

Made from a seed and fonts of Debian (fonts-dejavu, fonts-liberation, fonts-noto-cjk), so the same fonts give the same
pages. The sentences were written for this.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

FONTS = {
    "sans": "/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf",
    "serif": "/usr/share/fonts/truetype/dejavu/DejaVuSerif.ttf",
    "mono": "/usr/share/fonts/truetype/dejavu/DejaVuSansMono.ttf",
    "liberation": "/usr/share/fonts/truetype/liberation/LiberationSerif-Regular.ttf",
    "cjk": "/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc",
    "cjk serif": "/usr/share/fonts/opentype/noto/NotoSerifCJK-Bold.ttc",
}

LATIN = (
    "The harbour was quiet before the boats came in.",
    "Order 4711: three boxes of tea, two of sugar.",
    "Please leave the key with the porter at number 9.",
    "A late train left the station at 23:45.",
    "Invoice total 1,284.50 EUR, due on 30 June 2026",
    "Nobody had watered the plants for a week.",
    "Turn left behind the mill and follow the river.",
    "Signal lost. Retry in 15 seconds (attempt 3/5).",
    "Her handwriting leaned to the right, as ever.",
    "Warm bread, salted butter, and a jar of honey",
    "Measured twice, cut once, and still too short.",
    "Room 12b is closed on Mondays and holidays.",
)
SHORT = (
    "Invoice total",
    "Room 12b",
    "Signal lost",
    "Order 4711",
    "Turn left",
    "Warm bread",
    "A late train",
    "Wait here",
)
CHINESE = (
    "今天早上港口非常安静。",
    "请把钥匙交给门口的老人。",
    "最后一班火车在二十三点离开。",
    "发票总额为一千二百元整。",
    "一个星期没有人给花浇水。",
    "在磨坊后面左转沿着河走。",
    "信号丢失,十五秒后重试。",
    "热面包、黄油和一罐蜂蜜。",
    "图书馆星期一不开门。",
    "他的字总是向右边倾斜。",
)


@dataclass(frozen=True)
class Page:
    """What is on a page, and what was done to it. Sizes in pixels, angles in degrees."""

    name: str
    texts: tuple[str, ...]
    font: str = "sans"
    size: int = 30
    width: int = 1000
    turn: float = 0.0
    noise: float = 0.0  # standard deviation, of 255
    blur: float = 0.0
    shade: float = 0.0  # how much darker the right edge is
    tilt: float = 0.0  # how much narrower the upper edge is: taken from below
    quality: int = 90
    ink: int = 20
    paper: int = 245
    upside_down: tuple[int, ...] = ()  # lines that stand on their head


PAGES = (
    Page("latin", LATIN),
    Page("latin serif", LATIN, "serif", 26),
    Page("latin mono", LATIN[:8], "mono", 24),
    Page("latin small", LATIN, "liberation", 17, 700),
    Page("latin large", LATIN[:6], "liberation", 64, 1800),
    Page("latin turned", LATIN, turn=3),
    Page("latin turned back", LATIN, "serif", turn=-6),
    Page("latin noise", LATIN, noise=25),
    Page("latin noise and turn", LATIN, "liberation", 32, noise=18, turn=2),
    Page("latin photograph", LATIN, "serif", 32, noise=10, blur=0.8, shade=0.5, tilt=0.12, turn=1.5, quality=60),
    Page("latin white on black", LATIN[:8], ink=240, paper=25, noise=6),
    Page("latin upside down", SHORT, "sans", 40, 700, upside_down=(1, 4, 6)),
    Page("chinese", CHINESE, "cjk", 34),
    Page("chinese serif", CHINESE, "cjk serif", 30, 800),
    Page("chinese small", CHINESE, "cjk", 20, 600),
    Page("chinese turned", CHINESE, "cjk", 36, turn=-4),
    Page("chinese noise", CHINESE, "cjk", 36, noise=22),
    Page("chinese photograph", CHINESE, "cjk", 40, noise=10, blur=0.8, shade=0.5, tilt=0.1, turn=-1.5, quality=60),
    Page("both", (*LATIN[:5], *CHINESE[:5]), "cjk", 32, noise=8),
    Page("both on a large page", (*LATIN, *CHINESE), "cjk", 70, 2600, noise=8, turn=1),
)


def drawn(page: Page, seed: int = 7) -> bytes:
    """The page as a JPEG."""
    random = np.random.default_rng([seed, *page.name.encode()])
    picture = _disturbed(_turned(_written(page), page), page, random)
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=page.quality)
    return out.getvalue()


def _written(page: Page) -> Image.Image:
    font = ImageFont.truetype(FONTS[page.font], page.size)
    step = int(page.size * 1.9)
    picture = Image.new("L", (page.width, step * (len(page.texts) + 1) - step // 2), page.paper)
    for number, text in enumerate(page.texts):
        line = Image.new("L", (page.width - 2 * page.size, step), page.paper)
        ImageDraw.Draw(line).text((4, page.size // 3), text, page.ink, font)
        if number in page.upside_down:
            line = line.transpose(Image.Transpose.ROTATE_180)
        picture.paste(line, (page.size, step // 2 + number * step))
    return picture


def _turned(picture: Image.Image, page: Page) -> Image.Image:
    if page.tilt:
        wide, high = picture.size
        cut = page.tilt * wide / 2
        corners = (-cut, 0, 0, high, wide, high, wide + cut, 0)  # of the source: upper left, lower left, …
        picture = picture.transform(
            picture.size, Image.Transform.QUAD, corners, Image.Resampling.BICUBIC, fillcolor=page.paper
        )
    if page.turn:
        picture = picture.rotate(page.turn, Image.Resampling.BICUBIC, expand=True, fillcolor=page.paper)
    return picture


def _disturbed(picture: Image.Image, page: Page, random: np.random.Generator) -> Image.Image:
    if page.blur:
        picture = picture.filter(ImageFilter.GaussianBlur(page.blur))
    values = np.asarray(picture, np.float32)
    values = values * np.linspace(1, 1 - page.shade, values.shape[1], dtype=np.float32)
    if page.noise:
        values = values + random.normal(0, page.noise, values.shape)
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).convert("RGB")


def all_pages() -> Iterator[tuple[Page, bytes]]:
    for page in PAGES:
        yield page, drawn(page)


SMALL = (
    Page("latin", LATIN[:5], "sans", 22, 640, turn=2, noise=4, quality=60),
    Page("chinese", CHINESE[2:6], "cjk", 24, 460, turn=-3, noise=4, quality=60),
    Page("upside down", (SHORT[0], SHORT[1], SHORT[2]), "sans", 34, 400, upside_down=(0, 2), quality=60),
    Page("flat", LATIN[8:9], "sans", 20, 560, quality=60),
    Page("nothing on it", (), width=320, quality=60),
)
"""What `make test` reads: tests/data/reading."""

SMALL_SIDE = 320
"""Shortest side, in pixels, at which the detectors look at those: enough for them, and five times quicker."""
