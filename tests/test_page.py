"""The page of a study in a real browser: menus, sorting, widths, light and dark, hostile names."""

import itertools
import json
import random
import re
import time
from pathlib import Path
from urllib.parse import unquote

import pytest

from gnbench.runs.directory import METRICS
from tests.laid_down import page as write_page
from tests.laid_down import put, settings

pytestmark = pytest.mark.slow
EVIL = "<script>alert('name')</script><img src=x onerror=alert(1)>"
WIDTHS = (400, 1400)
# Of every trace what can be seen: where it lies, and how its axes run.
DRAWN = """name => JSON.stringify([...document.querySelectorAll(`[data-plots=${name}] .plot`)].map(
  ({data, layout}) => [data.map(t => [t.x, t.y, t.error_y?.visible]), layout.xaxis, layout.yaxis]
))"""


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """Three norms at three batch sizes over two seeds, with all that can be chosen; and another."""
    outputs = tmp_path_factory.mktemp("studies")
    rows = ["run_id,dataset,model,norm,batch_size,seed,weights,trained_images,statistics,images,"
            "test_error,test_wrong,test_total"]  # fmt: skip
    for seed in (0, 1):
        for size in (2, 8, 64):
            for number, norm in enumerate(("bn", "gn", "ln")):
                error = 10.0 + number + seed / 4 + 8 / size
                cell = {"batch_size": size, "seed": seed}
                run = put(outputs / "grid", error, f"norm={norm}", **cell, epochs=6)
                record = run.record() | {
                    "activation_bytes": 2**20 * size, "seconds": 100.0 / size + number,
                    "peak_memory_bytes": 2**20 * size + 2**27,
                }  # fmt: skip
                record["result"]["balanced_test_error"] = error + 1
                record["result"]["test_error_final"] = error - 0.5
                run.write_record(record)
                if norm == "bn":
                    start = f"{run.path.name},cifar10,simplenetv2,bn,{size},{seed},0,{size}"
                    rows.append(f"{start},ema,,{error},1,9")
                    rows += [f"{start},batch,{n},{error + n},1,9" for n in (2, 8)]
    put(outputs / "grid", 8.0, "model=resnet34", "norm=bn", batch_size=128)
    put(outputs / "grid", 1.0, "norm=gn", batch_size=2, seed=5, status="failed", epochs=1)
    (outputs / "grid" / "evaluations.csv").write_text("\n".join([*rows, ""]))
    for size in (4, 16):
        put(outputs / "other", 30.0 - size, "norm=gn", "dataset=fashion_mnist", batch_size=size)
    return outputs


@pytest.fixture(scope="module")
def both(studies):
    return write_page(studies)


@pytest.fixture(scope="module")
def grid(studies):
    return write_page(studies, "grid")


def column(page, title):
    """Return the texts of a column of the table of runs."""
    heads = page.locator("[data-table=runs] th").all_inner_texts()
    number = [head.split(" ▲")[0].split(" ▼")[0] for head in heads].index(title) + 1
    return page.locator(f"[data-table=runs] td:nth-child({number})").all_inner_texts()


def fits(page):
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_at_any_width_in_light_and_dark(opened, grid, width, scheme):
    page = opened(grid, width, scheme)
    assert fits(page)
    assert page.locator("h1").inner_text() == "gnbench: grid"
    drawn = page.locator(".plot .main-svg").first
    assert 250 < drawn.bounding_box()["width"] <= width
    ink = page.evaluate("document.querySelector('.plot').layout.font.color")
    assert (ink == "#1b1f24") == (scheme == "light")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")


@pytest.mark.parametrize("width", WIDTHS)
def test_every_menu_changes_what_is_drawn(opened, both, width):
    page = opened(both, width)
    plots = {
        "study": "figure", "panel": "figure", "metric": "figure", "axis": "figure",
        "order": "figure", "size": "curves", "curve": "curves", "over": "curves", "held": "memory",
        "evaluated": "evaluations",
    }  # fmt: skip
    assert sorted(plots) == sorted(s.get_attribute("id") for s in page.locator("select").all())
    known = {}
    for menu, name in plots.items():
        options = page.locator(f"#{menu} option").evaluate_all("all => all.map(o => o.value)")
        known[menu] = set(options)
        first = page.locator(f"#{menu}").input_value()
        seen = set()
        for option in options:
            page.select_option(f"#{menu}", option)
            seen.add(page.evaluate(DRAWN, name))
            assert fits(page)
        assert len(seen) == len(options) > 1, menu
        page.select_option(f"#{menu}", first)
    assert known["axis"] == {"size", "epochs", "steps", "seconds", "bytes", "peak"}
    assert known["metric"] == {
        "test_error", "test_error_final", "balanced_test_error", "train_error", "test_loss",
        "train_loss",
    }  # fmt: skip


def test_lines_seeds_intervals_and_published_values_are_switched_on_and_off(opened, grid):
    page = opened(grid)
    before = page.evaluate(DRAWN, "figure")
    for box in ("#intervals", "#seeds", "#published", "#lines input >> nth=1"):
        page.locator(box).uncheck()
        assert page.evaluate(DRAWN, "figure") != before, box
        page.locator(box).check()
        assert page.evaluate(DRAWN, "figure") == before, box
    page.locator("#lines label", has_text="GN").uncheck()
    lines = "document.querySelector('[data-plots=curves] .plot').data.map(t => t.name)"
    assert "GN" not in page.evaluate(lines)
    assert "LN" in page.evaluate(lines)


def test_the_drawn_numbers_are_those_of_the_data_and_of_the_table(opened, grid):
    page = opened(grid)
    traces = page.evaluate(
        "document.querySelector('.plot').data.filter(t => t.name === 'BN').map(t => [t.x, t.y])"
    )
    assert traces == [[[2, 8, 64], pytest.approx([14.125, 11.125, 10.25])]]
    page.locator("#figure summary").click()
    rows = page.locator("[data-table=figure] tbody tr").all_inner_texts()
    assert len(rows) == 9
    assert any(row.split("\t")[1:5:1][:2] == ["BN", "2"] and "14.125" in row for row in rows)


def test_time_to_a_given_error(opened, grid):
    page = opened(grid)
    page.fill("#target", "10.27")
    rows = page.locator("[data-table=curves] tbody tr").all_inner_texts()
    [bn] = [row.split("\t") for row in rows if row.split("\t")[1:3] == ["BN", "64"]]
    # Of its seeds, which end with 10.125 and 10.375 and fall by 0.01 an epoch, one gets there.
    assert bn[3:] == ["1 of 2", "1", "10", "1.5"]


def test_the_table_of_runs_is_sorted_and_filtered_by_keyboard_too(opened, grid):
    page = opened(grid)
    assert page.locator("#count").inner_text() == "20 of 20 runs"
    button = page.locator("[data-table=runs] th button", has_text=re.compile("^batch size$"))
    button.focus()
    page.keyboard.press("Enter")
    sizes = [int(text) for text in column(page, "batch size")]
    assert sizes == sorted(sizes)
    head = page.locator("[data-table=runs] th", has_text="batch size")
    assert head.get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Enter")  # the focus has stayed
    assert [int(text) for text in column(page, "batch size")] == sizes[::-1]
    assert head.get_attribute("aria-sort") == "descending"
    page.locator("[data-table=runs] th button", has_text=re.compile(r"^test error \(%\)$")).click()
    errors = [float(text) for text in column(page, "test error (%)") if text != "–"]
    assert errors == sorted(errors)
    page.fill("#filter", "gn fail")
    assert page.locator("#count").inner_text() == "1 of 20 runs"
    assert column(page, "status") == ["failed"]
    assert "it broke" in column(page, "what went wrong")[0]
    page.fill("#filter", "nothing like it")
    assert page.locator("#count").inner_text() == "0 of 20 runs"


def test_a_link_leads_to_the_directory_of_each_run(opened, grid):
    page = opened(grid)
    links = page.locator("[data-table=runs] tbody a").evaluate_all("all => all.map(a => a.href)")
    assert len(links) == 20
    for link in links:  # not followed: a browser's list of a directory talks on the console
        assert Path(unquote(link.removeprefix("file://")), "run.json").is_file()


def test_a_link_to_the_page_keeps_what_is_chosen(opened, both):
    page = opened(both)
    page.select_option("#study", label="grid")
    page.select_option("#metric", "test_loss")
    page.select_option("#axis", "seconds")
    page.locator("#seeds").uncheck()
    page.locator("#lines label", has_text="LN").uncheck()
    drawn = page.evaluate(DRAWN, "figure")
    address = page.url
    assert "metric=test_loss" in address
    again = opened(address.removeprefix("file://"))
    assert again.evaluate(DRAWN, "figure") == drawn
    assert again.locator("#lines label", has_text="LN").locator("input").is_checked() is False


def test_a_study_hides_what_is_said_of_the_others(opened, both):
    page = opened(both)
    page.select_option("#study", label="other")
    said = page.locator("#answer").inner_text()
    assert "fashion_mnist" in said
    assert "cifar10" not in said
    assert page.locator("#count").inner_text() == "2 of 22 runs"
    assert page.locator("#evaluations").is_hidden()


def test_it_can_be_used_without_a_mouse_and_without_eyes(opened, grid):
    page = opened(grid)
    unnamed = page.evaluate(
        """[...document.querySelectorAll('select, input, button, table, [role=img], [role=region]')]
        .filter(e => e.closest('.modebar') === null && !e.closest('[hidden]'))
        .filter(e => !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim()))
        .map(e => e.outerHTML.slice(0, 80))"""
    )
    assert unnamed == []
    levels = page.locator("h1, h2, h3, h4").evaluate_all("all => all.map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert page.locator("main > section:not([aria-labelledby]):not([aria-label])").count() == 0
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the figure"
    reached = set()
    for _ in range(90):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert {"panel", "metric", "axis", "order", "seeds", "curve", "target", "filter"} <= reached | {
        select.get_attribute("id") for select in page.locator("select:disabled").all()
    }


def test_it_follows_the_browser_into_the_dark_and_is_light_on_paper(opened, grid):
    page = opened(grid)
    ink = "document.querySelector('.plot').layout.font.color"
    light = page.evaluate(ink)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"{ink} !== '{light}'")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(ink) == light
    assert page.locator("details:not([open])").count() == 0
    page.emulate_media(color_scheme="dark", media="print")
    assert page.locator("nav").is_hidden()
    page.emulate_media(color_scheme="dark", media="screen")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(ink) != light
    assert page.locator("details[open]").count() == 0
    assert len(page.pdf()) > 20_000


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_bar_of_tools_covers_a_title(opened, grid, scheme):
    page = opened(grid, 400, scheme, is_mobile=True, has_touch=True)
    assert page.locator(".modebar-btn").count() == 0
    page = opened(grid, 1400, scheme)
    page.locator("[data-plots=figure] .plot").hover()
    bar = page.locator("[data-plots=figure] .modebar-group:has(.modebar-btn)").first
    assert bar.is_visible()
    colour = bar.evaluate("e => getComputedStyle(e).backgroundColor")
    assert colour == page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_no_tool_sends_anything_anywhere(opened, grid):
    tools = opened(grid).locator("[data-plots=figure] .modebar-btn")
    assert {*tools.evaluate_all("all => all.map(e => e.dataset.title)")} == {
        "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes", "Save as SVG",
    }  # fmt: skip


def test_the_figure_can_be_saved(opened, grid):
    page = opened(grid)
    with page.expect_download() as waiting:
        page.locator("[data-plots=figure] .plot").hover()
        page.locator("[data-plots=figure] [data-title='Save as SVG']").click()
    text = waiting.value.path().read_text()
    assert "<svg" in text
    assert "BN" in text


def test_of_many_lines_all_stand_in_the_picture_that_is_saved(opened, tmp_path):
    optimizer = settings("norm=bn")["optimizer"]
    for norm, lr in itertools.product(("bn", "gn"), range(1, 11)):
        more = {"optimizer": optimizer | {"lr": lr / 1000, "weight_decay": lr / 100}}
        put(tmp_path / "many", 10.0 + lr, f"norm={norm}", **more)
    page = opened(write_page(tmp_path, "many"))
    page.locator("[data-plots=curves] .plot").hover()
    with page.expect_download() as waiting:
        page.locator("[data-plots=curves] [data-title='Save as SVG']").click()
    text = waiting.value.path().read_text()
    shown = page.context.new_page()
    shown.set_content(text)
    spans = "all => all.map(e => e.getBoundingClientRect()).map(box => [box.top, box.bottom])"
    names = shown.locator(".legendtext").evaluate_all(spans)
    [[_, foot]] = shown.locator(".xtitle").evaluate_all(spans)
    [[_, end], *_] = shown.locator("svg").evaluate_all(spans)
    assert len(names) == 20
    assert all(foot <= top < bottom <= end for top, bottom in names)


COVERS_NOTHING = """([name, labels, width]) => {
    const [title, key, plot] = ['.xtitle', '.key', '.plot'].map(
        part => document.querySelector(`[data-plots=${name}] ${part}`));
    if (!title || !key || !plot?.data) return false;
    const [above, box] = [title, key].map(part => part.getBoundingClientRect());
    const all = part => [...key.querySelectorAll(part)];
    const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);
    return above.height > 0 && above.bottom <= box.top + 1 && box.width <= width
        && key.scrollWidth <= key.clientWidth + 1
        && same(all('li').map(e => e.innerText), labels)
        && same(all('path:first-child').map(e => e.getAttribute('stroke')),
                plot.data.filter(t => t.name).map(t => t.line.color));
}"""


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("lines", [2, 12])
def test_keys_name_every_line_and_cover_nothing(opened, tmp_path, width, lines):
    optimizer = settings("norm=bn")["optimizer"]
    for norm, lr in itertools.product(("bn", "gn"), range(1, lines // 2 + 1)):
        more = {"optimizer": optimizer | {"lr": lr / 1000}} if lines > 2 else {}
        run = put(tmp_path / "key", 10.0 + lr, f"norm={norm}", **more)
        run.write_record(run.record() | {"activation_bytes": 2**20 * lr})
    path = write_page(tmp_path, "key")
    labels = ["BN", "GN"]
    if lines > 2:
        labels = [f"{norm} optimizer.lr={lr / 1000}" for norm in labels for lr in range(1, 7)]
    page = opened(path, width)
    for scheme, media in (("light", "screen"), ("dark", "screen"), ("light", "print")):
        page.emulate_media(color_scheme=scheme, media=media)
        for name in ("curves", "memory"):  # drawn anew by then
            page.wait_for_function(COVERS_NOTHING, arg=[name, labels, width])
    for box in page.locator("#lines input").all():
        box.uncheck()
    assert page.locator(".key").count() == 0


def test_published_values_look_like_their_norms_whatever_the_labels_of_lines_say(opened, tmp_path):
    for lr in (1e-3, 1e-2):
        optimizer = settings("norm=gn")["optimizer"] | {"lr": lr}
        for size in (2, 8):
            put(tmp_path / "lr", 10.0, "norm=gn", batch_size=size, optimizer=optimizer)
    page = opened(write_page(tmp_path, "lr"))
    hollow = page.locator("[data-plots=figure] .plot").evaluate(
        """e => e.data.filter(t => t.marker?.symbol?.endsWith('-open')).map(
            t => [t.name, t.marker.color, t.marker.symbol])"""
    )
    assert sorted(hollow) == [
        ["BN, deuscher2021 (corrected)", "#0072b2", "circle-open"],
        ["GN, deuscher2021 (corrected)", "#d62728", "square-open"],
    ]


def test_small_settings_are_told_apart_on_the_axis(opened, tmp_path):
    for lr in (1e-4, 2e-4, 5e-4, 1e-3, 2e-3):
        put(tmp_path / "lr", 10.0, optimizer=settings("norm=gn")["optimizer"] | {"lr": lr})
    page = opened(write_page(tmp_path, "lr"))
    ticks = page.locator("[data-plots=figure] .xtick text").all_text_contents()
    assert sorted(ticks) == ["0.0001", "0.0002", "0.0005", "0.001", "0.002"]


def test_no_run_one_run_and_failures_alone(opened, tmp_path):
    cell = {"dataset": "a", "model": "b", "norm": "c", "batch_size": 2, "seed": 0}
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "sweep-00000000.json").write_text(json.dumps([{"run_id": "a-b", **cell}]))
    put(tmp_path / "one", 10.0, "norm=gn")
    put(tmp_path / "failed", 10.0, status="failed", epochs=0)
    (tmp_path / "failed" / "half").mkdir()
    (tmp_path / "failed" / "half" / "run.json").write_text("{")
    for name, plots in (("none", 0), ("one", 1), ("failed", 0)):
        path = write_page(tmp_path, name)
        for width in WIDTHS:
            page = opened(path, width)
            assert fits(page)
            assert page.locator("[data-plots=figure] .plot").count() == plots
            note = page.locator("[data-note=figure]").inner_text()
            assert note.startswith("No run is finished: there is" if plots == 0 else "Intervals:")
            assert page.locator("[data-table=runs] tbody tr").count() == (name != "none")
    assert "run.json is not JSON" in page.locator("#gaps").inner_text()


def test_names_never_become_markup(opened, tmp_path):
    for group in ("norm", "model", "dataset", "optimizer"):
        for size in (2, 4):
            config = settings("norm=gn")
            evil = {group: config[group] | {"name": EVIL}}
            name = f"{group}{size}<img src=x onerror=alert(2)>"
            run = put(tmp_path / "evil", 10.0, "norm=gn", name=name, batch_size=size, **evil)
            run.log_path.write_text("hello\n")
    run = put(tmp_path / "evil", 1.0, "norm=bn", status="failed", name="failed")
    run.write_record(run.record() | dict.fromkeys(("error", "device", "started"), EVIL))
    path = write_page(tmp_path, "evil")
    for width in WIDTHS:
        page = opened(path, width)
        assert fits(page)
        for menu in ("axis", "panel"):
            options = page.locator(f"#{menu} option").evaluate_all("all => all.map(o => o.value)")
            for option in options:
                page.select_option(f"#{menu}", option)
        page.select_option("#panel", "all")
        page.locator("[data-plots=figure] .nsewdrag").first.hover(force=True)
        assert EVIL in page.locator("#gaps").inner_text()
        assert page.locator("img").count() == 0
        assert page.locator("script").count() == 3
        assert page.locator(".gtitle", has_text="<script>").count() > 0


def test_a_thousand_runs_are_read_written_and_turned_over_without_waiting(opened, tmp_path):
    numbers = random.Random(0)
    for seed in range(42):
        for norm in ("bn", "gn", "ln", "in"):
            for size in (2, 4, 8, 16, 32, 64):
                error = round(numbers.uniform(10, 20), 2)
                run = put(tmp_path / "many", error, f"norm={norm}", batch_size=size, seed=seed)
                run.write_record(run.record() | {"activation_bytes": numbers.randrange(10**8)})
                rows = [",".join(METRICS)]
                for epoch in range(1, 31):  # numbers with all their digits, as a training has them
                    values = [20 * numbers.random() for _ in range(7)]
                    values[4:4] = [round(100 * error), 10_000]
                    rows.append(",".join(map(str, (epoch, 782 * epoch, *values))))
                run.metrics_path.write_text("\n".join([*rows, ""]))
    path = write_page(tmp_path, "many")
    assert path.stat().st_size < 6_000_000
    for width in WIDTHS:
        page = opened(path, width)
        assert page.locator("#count").inner_text() == "1008 of 1008 runs"
        begun = time.monotonic()
        page.select_option("#axis", "seconds")
        page.fill("#filter", "bs64 seed41")
        assert time.monotonic() - begun < 20  # half a second on a machine that has nothing else
        assert page.locator("#count").inner_text() == "4 of 1008 runs"
        assert fits(page)
