"""Pictures side by side on one sheet, each with its label."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

GAP, LINE = 8, 22
TEXT = ImageFont.load_default(14)
PAPER, INK = (255, 255, 255), (30, 30, 30)


def sheet(title: str, pictures: Sequence[tuple[str, Image.Image]], columns: int, side: int) -> Image.Image:
    """`pictures` are labels and pictures, row by row; each is drawn `side` pixels wide and high."""
    rows = -(-len(pictures) // columns)
    width, height = columns * (side + GAP) + GAP, LINE + GAP + rows * (side + LINE + GAP)
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((width // 2, LINE // 2 + GAP // 2), title, INK, TEXT, anchor="mm")
    for number, (label, picture) in enumerate(pictures):
        row, column = divmod(number, columns)
        x, y = GAP + column * (side + GAP), LINE + GAP + row * (side + LINE + GAP)
        page.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (x, y))
        draw.text((x + side // 2, y + side + LINE // 2), label, INK, TEXT, anchor="mm")
    return page


def save(page: Image.Image, file: str) -> None:
    """With 256 colours: a third of the bytes, and nobody sees it."""
    page.quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)
