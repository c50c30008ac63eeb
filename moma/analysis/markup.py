"""Pieces of a page that stands alone: tables, figures inside it, numbers as text.

Needs no network and no script, and prints. Whatever is not `Html` already is escaped. Refuses a page of more than 5 MB.
"""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from moma.analysis.speedup import Interval

MOST_BYTES = 5_000_000


class Html(str):
    """Text that is markup already; everything else is escaped."""


def signed_interval(found: Interval, digits: int = 4) -> str:
    """A difference in nats with its interval, where it has one; a true minus sign."""
    ends = "" if found.low is None else f" [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    return f"{found.mean:+.{digits}f}{ends}".replace("-", "−")


def number(value: float | None, digits: int = 4) -> str:
    """Fixed digits; empty for None."""
    return "" if value is None else f"{value:.{digits}f}"


def integer(value: float | None) -> str:
    """Rounded, thousands apart; empty for None."""
    return "" if value is None else f"{value:,.0f}"


def percent(value: float | None) -> str:
    """A share with one digit; empty for None."""
    return "" if value is None else f"{value:.1%}"


def scaled(value: float | None, unit: float, digits: int) -> str:
    """A number in another unit; empty for None."""
    return "" if value is None else f"{value / unit:,.{digits}f}"


def count(n: int, what: str) -> str:
    """`1 seed`, `2 seeds`."""
    return f"{n} {what}" + ("" if n == 1 else "s")


def mark(text: str, strong: bool) -> str:
    """Bold where `strong`."""
    return Html(f"<b>{html.escape(text)}</b>") if strong else text


def section(title: str, body: str) -> str:
    """A headed part of the page."""
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"


def captioned(drawn: dict[str, Path], name: str, title: str, caption: str) -> str:
    """A section of one figure of `drawn` with its caption."""
    return section(title, figure(drawn[name], title) + f"<figcaption>{html.escape(caption)}</figcaption>")


def figure(path: Path, alt: str) -> str:
    """A PNG inside the page; `alt`: its words for who cannot see it."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f"<img class=figure alt='{html.escape(alt)}' src='data:image/png;base64,{data}'>"


def table(head: Sequence[str], body: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Rows of text or `Html`; columns in `numbers` are set flush right."""

    def cells(row: Sequence[str], tag: str) -> str:
        kinds = (" class=n" if i in numbers else "" for i in range(len(row)))
        texts = (cell if isinstance(cell, Html) else html.escape(str(cell)) for cell in row)
        return "".join(f"<{tag}{kind}>{text}</{tag}>" for kind, text in zip(kinds, texts, strict=True))

    rows = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in body)
    return f"<div class=wide><table><thead><tr>{cells(head, 'th')}</tr></thead><tbody>{rows}</tbody></table></div>"


def whole(title: str, body: str, remedy: str, most: int = MOST_BYTES, width: int = 940) -> str:
    """The page as one file, `width` pixels at most; raises ValueError with `remedy` where it has more than `most`
    bytes."""
    style = _STYLE.replace("WIDTH", f"{width}px")
    page = _PAGE.format(title=html.escape(title), style=style, body=body)
    if len(page.encode()) > most:
        raise ValueError(f"got a page of {len(page.encode()) / 1e6:.1f} MB, need at most {most / 1e6:.0f} MB: {remedy}")
    return page


_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1f2328;
  background: #fff; max-width: WIDTH; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .7rem; padding-bottom: .25rem; border-bottom: 1px solid #d8dee4; }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; }
.sub { color: #656d76; margin: .4rem 0 0; }
.banner { background: #f6f8fa; border-left: 4px solid #d55e00; padding: .6rem .9rem; margin: 0 0 1rem;
  font-weight: 600; }
.warn { color: #a40e26; }
.note, figcaption { color: #57606a; font-size: .85rem; margin: .5rem 0 1rem; max-width: 75ch; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; min-width: 40%; font-size: .85rem; margin: .3rem 0;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem 1.1rem .3rem 0; border-bottom: 1px solid #eaeef2;
  vertical-align: top; }
th { color: #57606a; font-weight: 600; border-bottom: 1px solid #afb8c1; vertical-align: bottom; }
td.n { white-space: nowrap; }
th.n, td.n { text-align: right; }
.fit td { white-space: nowrap; padding-right: .8rem; }
.banner + .note { margin-top: 1rem; }
header { margin-bottom: 1rem; }
.captions table, .tokens table { width: 100%; }
.captions td { white-space: pre-wrap; overflow-wrap: anywhere; vertical-align: middle; }
img.figure { width: 100%; max-width: 900px; height: auto; display: block; }
img.small { width: 48px; height: 48px; border: 1px solid #d8dee4; display: block; }
code { background: #f0f3f6; border-radius: 3px; padding: 0 .25em; white-space: pre; font-size: .92em; }
.tokens td { line-height: 1.75; }
pre { background: #f6f8fa; padding: .8rem; overflow-x: auto; font-size: .8rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
summary { cursor: pointer; color: #57606a; font-size: .85rem; }
@media print { body { max-width: none; padding: 0; font-size: 11px; } h2, h3 { break-after: avoid; }
  img, tr, pre { break-inside: avoid; } .wide { overflow: visible; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
