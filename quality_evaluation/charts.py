"""Charts of the report as inline SVG: numbers in, markup out. No script, no image file; knows nothing of records.

All are drawn 400 units wide, about the width of a phone, and scale with the column they stand in.
"""

from collections.abc import Callable
from html import escape

WIDTH, HEIGHT = 400, 200
LEFT, RIGHT, TOP, BOTTOM = 50, 388, 18, 172  # the plotting area


def svg(title: str, body: str) -> str:
    """A chart with its accessible name, which is also its caption."""
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg role="img" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f"<title>{escape(title)}</title>{body}</svg></figure>"
    )


def label(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def y_axis(highest: float, write: Callable[[float], str]) -> str:
    """Three horizontal lines with their values: nothing, half, everything."""
    parts = []
    for share in (0, 0.5, 1):
        y = BOTTOM - share * (BOTTOM - TOP)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(label(LEFT - 5, y + 4, write(share * highest), "end"))
    return "".join(parts)


def histogram(bins: dict[int, list[int]], per_unit: int, threshold: float, title: str) -> str:
    """Counts of kept and dropped records by score, up to 1, and the threshold.

    Args:
        bins: number of a bin -> [kept, dropped]; bin i covers scores from i / per_unit to (i + 1) / per_unit.
    """
    first = min([*bins, per_unit - 4])
    low, width = first / per_unit, (RIGHT - LEFT) / (per_unit - first)
    tallest = -(-max(map(sum, bins.values())) // 2) * 2  # even, so that half of it is a count
    scale = (BOTTOM - TOP) / tallest
    parts = [y_axis(tallest, "{:,.0f}".format)]
    for number, counts in sorted(bins.items()):
        x, y = LEFT + (number - first) * width, BOTTOM
        for count, kind in zip(counts, ("kept", "dropped"), strict=True):
            if count:
                height = max(count * scale, 1.5)  # one record among thousands can be seen
                y -= height
                span = f"{number / per_unit:.3f} to {(number + 1) / per_unit:.3f}"
                parts.append(
                    f'<rect class="{kind}" x="{x + 0.5:.1f}" y="{y:.1f}" width="{width - 1:.1f}" height="{height:.1f}">'
                    f"<title>{span}: {count:,} {kind}</title></rect>"
                )
    step = next(step for step in (0.05, 0.1, 0.2, 0.5) if (1 - low) / step <= 8)
    ticks = [round(1 - number * step, 2) for number in range(int((1 - low) / step + 1e-6) + 1)]
    parts += [label(LEFT + (tick - low) * per_unit * width, BOTTOM + 16, f"{tick:g}") for tick in ticks]
    x = LEFT + (min(threshold, 1) - low) * per_unit * width
    if x >= LEFT:
        parts.append(f'<line class="threshold" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 4}" y2="{BOTTOM}"/>')
        parts.append(label(x, TOP - 7, f"threshold {threshold:g}", "end" if x > WIDTH / 2 else "start"))
    else:
        parts.append(label(LEFT, TOP - 7, f"← threshold {threshold:g}", "start"))
    return svg(title, "".join(parts))


def curve(
    points: list[tuple[float, float]], title: str, write: Callable[[float], str], highest: float, marked: float | None
) -> str:
    """A line through (x, y) with y from 0 to `highest`; the point at x = `marked` stands out."""
    low, high = points[0][0], points[-1][0]
    places = [
        (
            LEFT + 12 + (x - low) / ((high - low) or 1) * (RIGHT - LEFT - 24),
            BOTTOM - y / (highest or 1) * (BOTTOM - TOP),
        )
        for x, y in points
    ]
    parts = [y_axis(highest, write)]
    parts.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
    labelled = 0.0
    for (x, y), (value, height) in zip(places, points, strict=True):
        kind = ' class="marked"' if value == marked else ""
        parts.append(f'<circle{kind} cx="{x:.1f}" cy="{y:.1f}" r="{5 if kind else 3}">')
        parts.append(f"<title>{value:g}: {escape(write(height))}</title></circle>")
        if x >= labelled + 28:  # labels do not touch
            parts.append(label(x, BOTTOM + 16, f"{value:g}"))
            labelled = x
    return svg(title, "".join(parts))
