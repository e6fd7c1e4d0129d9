"""The picture of the measured figures: its numbers can be read."""

import runpy
from pathlib import Path

SUMMARY = Path(__file__).resolve().parents[1] / "benchmarks" / "summary.py"


def test_no_number_lies_on_the_line_at_one() -> None:
    shares = (0.02, 0.4, 0.49, 0.51, 0.65, 0.9, 0.98, 1.0, 1.3)
    rows = [
        {"what": "x", "value": 100 * s, "aim": 100.0, "upper": True, "met": s <= 1, "machine": machine}
        for s, machine in zip(shares, "aab" * 3, strict=True)
    ]
    figure = runpy.run_path(str(SUMMARY))["draw"](rows)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    line, _ = axes.transData.transform((1.0, 0.0))
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == len(shares)
    assert not any(box.x0 <= line <= box.x1 for box in boxes)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b", "missed"]
    colours = [bar.get_facecolor() for bar in axes.patches][::-1]
    assert len({*colours[:8]}) == 2
    assert colours[-1] not in colours[:8]
