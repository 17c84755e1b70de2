"""What goes into a paper: a table that claims what the verdict shows, a figure for a column."""

import re

import matplotlib as mpl
import pytest
from matplotlib.mathtext import MathTextParser

from gnbench import ConfigError
from gnbench.aggregate import latex
from gnbench.aggregate.__main__ import write_studies
from gnbench.aggregate.figure import draw_errors, styled
from gnbench.aggregate.statistics import settings_of, summarize
from gnbench.aggregate.study import read_study
from gnbench.aggregate.verdict import panels
from tests.laid_down import put


@pytest.fixture
def study(tmp_path):
    """GN is better than BN at 2, worse at 8, and at 4 nobody knows."""
    path = tmp_path / "outputs" / "demo"
    for seed, shift in enumerate((-1.0, 0.0, 1.0)):
        for size, bn, gn in ((2, 30.0, 20.0), (4, 25.0, 25.5), (8, 20.0, 30.0)):
            put(path, bn + shift, "norm=bn", batch_size=size, seed=seed)
            put(path, gn + shift, "norm=gn", batch_size=size, seed=seed)
    return path


def table(path, order="descending"):
    runs = read_study(path).runs
    summary = summarize(runs)
    return latex.table(summary, panels(runs, settings_of(summary), "bn"), order)


def body(text):
    return [line for line in text.splitlines() if not line.startswith("%")]


def test_the_table_by_hand(study):
    """Residuals −1, 0, 1 in six cells of errors p: scale = Σ 2 / p (100 − p) / 12."""
    scale = 2 / 12 * 2 * (1 / 2100 + 1 / 1600) + 2 / 12 * (1 / 1875 + 1 / (25.5 * 74.5))
    t = 2.178813  # t(0.975, 12)
    halves = {p: t * (scale * p * (100 - p) / 3) ** 0.5 for p in (20.0, 25.0, 25.5, 30.0)}

    def cell(p):
        return rf"{p:.2f} \pm {halves[p]:.2f}"

    assert body(table(study)) == [
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r"batch size & 8 & 4 & 2 \\",
        r"\midrule",
        rf"BN & $\mathbf{{{cell(20.0)}}}$ & ${cell(25.0)}$ & ${cell(30.0)}$ \\",
        rf"GN & ${cell(30.0)}$ & ${cell(25.5)}$ & $\mathbf{{{cell(20.0)}}}$ \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    assert "batch size & 2 & 4 & 8" in table(study, "ascending")


def test_bold_is_a_reference_only_where_all_that_is_compared_with_it_is_worse(study):
    for seed in (0, 1, 2):
        put(study, 20.2 + seed, "norm=ln", batch_size=8, seed=seed)  # not shown to be worse
    text = table(study)
    at_eight = [line.split("&")[1] for line in text.splitlines() if line[:3] in ("BN ", "GN ")]
    assert not any("mathbf" in cell for cell in at_eight)
    assert text.count("mathbf") == 1


def test_single_seeds_have_neither_intervals_nor_bold(tmp_path):
    put(tmp_path / "a", 10.0, "norm=bn")
    put(tmp_path / "a", 40.0, "norm=gn")
    assert body(table(tmp_path / "a"))[4:6] == [r"BN & $10.00$ \\", r"GN & $40.00$ \\"]


def test_what_latex_takes_for_commands_is_shown_as_it_is(tmp_path):
    path = tmp_path / "a"
    put(path, 10.0, "norm=gn", "norm.num_groups=8")
    put(path, 11.0, "norm=gn")
    put(path, 90.0, "norm=bn", "norm.name=my_norm", status="diverged")
    put(path, 12.0, "norm=bn", "model=resnet34")
    lines = body(table(path))
    assert r"\multicolumn{2}{l}{\emph{cifar10, simplenetv2}} \\" in lines
    assert r"GN norm.num\_groups=8 & $10.00$ \\" in lines
    assert r"MY\_NORM & $90.00^{\dagger}$ \\" in lines
    for line in lines:
        assert not re.search(r"(?<!\\)[_#%^~]", re.sub(r"\$[^$]*\$", "", line))
    assert latex.escaped("a_b & 50% #1 {x} $y$ ~^\\") == (
        r"a\_b \& 50\% \#1 \{x\} \$y\$ \textasciitilde{}\textasciicircum{}\textbackslash{}"
    )


def test_every_row_has_as_many_cells_and_every_formula_is_one(study):
    put(study, 12.0, "norm=bn", "model=resnet34", batch_size=128)
    text = table(study)
    for line in body(text):
        if "&" in line:
            assert line.count("&") == 4
            assert line.endswith(r" \\")
        assert line.count("{") == line.count("}")
        for formula in re.findall(r"\$[^$]*\$", line):
            MathTextParser("path").parse(formula)
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 1


def drawn(path, style):
    runs = read_study(path).runs
    with styled(style):
        return draw_errors(summarize(runs), runs, paper=style == "paper")


def test_a_figure_for_a_paper_is_as_wide_as_a_column_and_has_no_title(study):
    [axis] = drawn(study, "paper").axes
    assert axis.figure.get_figwidth() == 3.25
    assert axis.get_title() == ""
    assert axis.xaxis.label.get_fontsize() == 8
    assert axis.get_legend().get_texts()[0].get_fontsize() == pytest.approx(8 * 0.833)
    [screen] = drawn(study, "screen").axes
    assert screen.get_title() == "cifar10, simplenetv2"
    assert [list(line.get_ydata()) for line in screen.lines] == [
        list(line.get_ydata()) for line in axis.lines
    ]


def test_of_several_networks_each_is_named_at_its_axis(study):
    for size in (2, 4):
        put(study, 12.0, "norm=bn", "model=resnet34", "norm.momentum=0.5", batch_size=size)
    figure = drawn(study, "paper")
    assert [axis.get_ylabel() for axis in figure.axes] == [
        f"cifar10, {model}\ntest error (%)" for model in ("resnet34", "simplenetv2")
    ]
    width = figure.bbox.width
    figure.draw_without_rendering()
    for axis in figure.axes:  # nothing is cut off at the edge of the column
        for part in (axis.get_legend(), axis.yaxis.label):
            box = part.get_window_extent()
            assert 0 <= box.x0 < box.x1 <= width
        assert axis.get_legend().get_window_extent().y1 < axis.xaxis.label.get_window_extent().y0


def test_type_is_embedded_whole_and_the_style_ends_with_the_figure(study, tmp_path):
    before = dict(mpl.rcParams)
    write_studies(study.parent, style="paper")
    assert dict(mpl.rcParams) == before
    pdf = (study / "figure.pdf").read_bytes()
    assert b"/CIDFontType2" in pdf
    assert b"/Type3" not in pdf
    assert b'width="234pt"' in (study / "figure.svg").read_bytes()  # 3.25 · 72
    text = (study / "table.tex").read_text()
    assert "Bold: shown to err less (p < 0.05 by Holm) than BN" in text
    with pytest.raises(ConfigError, match=r"figure\.style=poster: choose one of screen, paper"):
        write_studies(study.parent, style="poster")
