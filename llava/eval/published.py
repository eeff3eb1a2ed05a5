"""The numbers published for LLaVA-Qwen2-7B-UHD (arXiv 2503.12303, main comparison at high resolution), each with its source.

`printed` numbers stand in the paper's figure; `measured` ones were read off its polygons (error about 0.1, MME 1). Numbers
of other tables are not known to us and left out. Splits and judges were not published.
"""

ORDER = (
    "MME", "MMBench", "MMStar", "MMVet", "POPE", "RealWorldQA", "ScienceQA", "AI2D", "MathVista", "ChartQA", "DocVQA",
    "OCRBench",
)  # fmt: skip


def column(source: str, *values: float) -> tuple[str, dict[str, float]]:
    return source, dict(zip(ORDER, values, strict=True))


PUBLISHED: dict[str, tuple[str, dict[str, float]]] = {
    "base": column(
        "printed, LLaVA-Qwen2-7B-UHD", 1554.8, 77.6, 48.9, 38.3, 87.3, 63.5, 77.3, 74.9, 38.9, 70.0, 70.2, 55.2
    ),
    "SICOG": column(
        "printed, SIcog-LLaVA-Qwen2-7B-UHD", 1596.6, 78.1, 52.5, 40.6, 87.8, 65.2, 79.4, 78.4, 41.4, 73.1, 73.7, 57.7
    ),
    "LLaVA-NeXT-34B-captions": column(
        "measured, older figure", 1585.1, 77.7, 50.6, 35.3, 86.5, 65.3, 78.4, 76.0, 36.9, 71.6, 71.2, 55.9
    ),
    "Qwen2-VL-72B-captions": column(
        "measured, newer figure", 1597.0, 77.7, 51.9, 37.2, 86.5, 63.4, 79.4, 76.5, 38.3, 72.4, 71.1, 55.2
    ),
    "Multi-Experts": column(
        "measured, both figures", 1548.7, 78.0, 49.9, 39.8, 86.5, 64.7, 77.8, 76.6, 37.9, 71.8, 71.3, 56.6
    ),
}  # fmt: skip
