from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser

import pytest
import torch
from helpers.readouts import D_VOCAB, LAYERS, POSITIONS, PROMPT, contrast, readout, result_of, small

from tl_backward import plotting
from tl_backward.lens.readout import Readout
from tl_backward.lens.result import BackwardLensResult
from tl_backward.lens.tables import lens_tables
from tl_backward.plotting import visible

ZERO = (2, 1)


# ----- results and pages -----


def with_zero_row(readout: Readout) -> Readout:
    """As the lens leaves a row whose vector is zero."""
    values = {
        "top_ids": -1,
        "bottom_ids": -1,
        "top_values": torch.nan,
        "bottom_values": torch.nan,
        "target_ranks": -1,
        "norms": 0.0,
        "vjp_norms": 0.0,
        "zero_mask": True,
    }
    changed = {name: getattr(readout, name).clone() for name in values}
    for name, value in values.items():
        changed[name][ZERO] = value
    return replace(readout, **changed)


@dataclass
class Cell:
    attributes: dict[str, str | None]
    text: str = ""
    tokens: list[str] = field(default_factory=list)
    card: str = ""

    @property
    def level(self) -> float:
        return float((self.attributes["style"] or "").removeprefix("--level:").removesuffix("%"))

    @property
    def is_hit(self) -> bool:
        return self.attributes.get("class") == "hit"


class Page(HTMLParser):
    """The tables of a page, rows of cells; it insists on properly nested tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.tables: list[list[list[Cell]]] = []
        self.title = self.prompt = self.body = ""
        self.path: list[tuple[str, str | None]] = []
        self.feed(html)
        self.close()
        assert self.path == []

    @property
    def cell(self) -> Cell:
        return self.tables[-1][-1][-1]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag == "meta":
            return
        if tag == "br":
            return self.handle_data("\n")
        self.path.append((tag, attributes.get("class")))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append(Cell(attributes))
        elif tag == "bdi" and self.path[-2][0] in ("td", "th"):
            self.cell.tokens.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.path.pop()[0] == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        tags = [tag for tag, _ in self.path]
        if "title" in tags:
            self.title += data
        if "body" in tags:
            self.body += data
        if ("p", "prompt") in self.path:
            self.prompt += data
        if ("div", "card") in self.path:
            self.cell.card += data
        elif "td" in tags or "th" in tags:
            self.cell.text += data
            if tags[-1] == "bdi":
                self.cell.tokens[-1] += data


def lens_page(result: BackwardLensResult) -> str:
    return plotting.lens_page(lens_tables(result))


def page_of(*readouts: Readout) -> Page:
    return Page(lens_page(result_of(*readouts)))


def words(text: str) -> str:
    return " ".join(text.split())


# ----- what stands where -----


def test_a_table_per_weight_has_a_row_per_layer_and_a_column_per_position():
    page = page_of(small("W_gate"), small("W_out"))
    assert [[len(row) for row in table] for table in page.tables] == [[5] * 4] * 2
    assert re.findall("<h2>(.*)</h2>", page.html) == ["W_gate", "W_out"]


def test_the_header_names_the_positions_that_were_read():
    header = page_of(small()).tables[0][0]
    assert [cell.tokens for cell in header[1:]] == [["<bos>"], ["·Rome"], ["⏎"], ["·in"]]
    assert [cell.text for cell in header[1:]] == ["<bos>0", "·Rome2", "⏎3", "·in5"]


def test_the_last_layer_is_on_top_and_every_cell_in_its_place():
    first, second = page_of(small("W_in"), small("W_out")).tables
    for kind, table in (("W_in", first), ("W_out", second)):
        assert [row[0].text for row in table[1:]] == ["6", "4", "1"]
        for i, row in zip((2, 1, 0), table[1:], strict=True):
            for j, cell in enumerate(row[1:]):
                most, least = f"{kind}·{i}.{j}·top0", f"{kind}·{i}.{j}·bottom0"
                assert cell.tokens == [most, least]
                assert words(cell.text) == f"{most} \\ {least}"


def test_the_card_of_a_cell_tells_the_rest():
    w_in, w_out = page_of(small("W_in"), small("W_out")).tables
    card = words(w_in[1][2].card)
    assert card.startswith("layer 6, ·Rome at 2 ‖x‖ 7, ‖δ‖ 0.818 target ·<b>: rank 509 of 1000")
    assert "-18.25 W_in·2.1·top0 -19.25 W_in·2.1·top1" in card
    assert "-42.50 W_in·2.1·bottom0 -43.50 W_in·2.1·bottom1" in card
    assert "‖x‖" not in w_out[1][2].card
    assert "‖δ‖ 0.818, read at the residual stream: 7 target" in words(w_out[1][2].card)


def test_the_head_of_the_page():
    page = page_of(small())
    assert words(page.prompt) == "<bos> Old ·Rome ⏎ is ·in → ·<b>"
    assert "4.0000 nats" in page.body
    assert "0.0183" in page.body  # exp(-4)
    assert "normalised" not in page.body
    normalised = lens_page(replace(result_of(small()), normalize=True))
    assert "normalised" in Page(normalised).body


def of_several_tokens() -> BackwardLensResult:
    """Four tokens of prompt; `` linebacker`` is predicted at positions 3, 4 and 5."""
    marked = small()
    marked.target_ranks[1, 2] = marked.target_ranks[0, 3] = D_VOCAB - 1
    return replace(
        result_of(marked),
        str_tokens=[*PROMPT[:4], " line", "back"],
        target_ids=torch.tensor([3, 3, 3, 5]),
        target=[" line", " line", " line", "er"],
        target_names={" linebacker": (3, 4, 5)},
        target_positions=torch.tensor([3, 4, 5]),
        loss_target=" linebacker",
        loss_target_ids=[3, 4, 5],
    )


def test_a_target_of_several_tokens_is_no_part_of_the_prompt():
    page = Page(lens_page(of_several_tokens()))
    assert words(page.prompt) == "<bos> Old ·Rome ⏎ → ·linebacker"
    assert page.title == "Backward lens: <bos>Old·Rome⏎ → ·linebacker"
    assert "a position that predicts one of them" in words(page.body)
    assert "a position that predicts one of them" not in page_of(small()).body


def test_each_position_of_a_target_of_several_tokens_has_its_own():
    result = of_several_tokens()
    table = Page(lens_page(result)).tables[0]
    cards = [[words(cell.card) for cell in row[1:]] for row in table[1:]]
    for row, ranks in zip(
        cards, (range(508, 512), [504, 505, 999, 507], [500, 501, 502, 999]), strict=True
    ):
        for card, name, rank in zip(row, ["·line"] * 3 + ["er"], ranks, strict=True):
            assert f"target {name}: rank {rank} of 1000" in card
    assert [[cell.is_hit for cell in row[1:]] for row in table[1:]] == [
        [False] * 4,
        [False, False, True, False],
        [False, False, False, True],
    ]
    (heatmap,) = result.plot().data
    assert "target \u2068er\u2069: rank 999 of 1000" in heatmap.customdata[2][3]
    assert [text.count("<b>") for text in heatmap.text[2]] == [0, 0, 0, 1]
    assert [plain(line.name) for line in result.plot("ranks").data][2:] == [
        "⏎ 3 → ·line",
        "back 5 → er",
    ]
    assert plain(result.plot().layout.title.text).startswith("Backward lens → ·linebacker")


def test_layers_without_a_site_are_named():
    result = replace(result_of(small("W_in"), small()), left_out={"W_out": [0, 2, 3, 5, 7, 8, 9]})
    page = Page(lens_page(result))
    assert page.body.count("layers without a site of") == 1
    assert "layers without a site of W_out: 0, 2, 3, 5, 7 to 9" in page.body
    assert "no W_out in 0, 2, 3, 5, 7 to 9" in repr(result)


def test_a_loss_without_a_target_is_no_likelihood():
    w_out = small()
    loss_fn = replace(result_of(w_out), loss_target=None)  # ranks of a target all the same
    page = Page(lens_page(loss_fn))
    assert "→" not in page.title + page.prompt
    assert "4.0000" in page.body and "nats" not in page.body and "exp" not in page.body
    assert "the target is the least probable token" in page.body
    none = torch.zeros(3, 4, 0)
    without = replace(w_out, target_ranks=none.long(), target_values=none)
    loss_fn = replace(loss_fn, readouts={"W_out": without}, target_ids=none[0, 0].long(), target=[])
    assert "target" not in Page(lens_page(loss_fn)).body
    assert "→" not in loss_fn.plot().layout.title.text


def test_descent_names_the_ends_of_a_vjp_the_other_way_round():
    marked = [small("W_in"), small("W_out")]
    for one in marked:
        one.target_ranks[0, 2] = 0
    result = replace(result_of(*marked), direction="descent")
    page = Page(lens_page(result))
    legends = re.findall(r"the target is the \w+ probable token", page.body)
    assert legends == [f"the target is the {end} probable token" for end in ("most", "least")]
    assert "that of a VJP the least \\ most probable one" in words(page.body)
    assert "0 is the most probable, of a VJP the least probable" in words(page.body)
    for kind, table, ends in zip(
        ("W_in", "W_out"), page.tables, (("most", "least"), ("least", "most")), strict=True
    ):
        assert table[3][3].is_hit
        assert re.findall(r"(\w+) probable", table[1][1].card) == list(ends)
        (heatmap,) = result.plot("table", kind).data
        assert re.findall(r"<b>(\w+) probable", heatmap.customdata[0][0]) == list(ends)
        axis = result.plot("ranks", kind).layout.yaxis.title.text
        assert axis == f"rank: 0 {ends[0]}, 999 {ends[1]} probable"


def test_a_zero_row_is_an_empty_cell():
    table = page_of(with_zero_row(small())).tables[0]
    cells = {(row[0].text, j): cell for row in table[1:] for j, cell in enumerate(row[1:])}
    assert cells["6", 1] == Cell({})
    assert [place for place, cell in cells.items() if not cell.text] == [("6", 1)]


def test_an_input_that_meets_a_zero_vjp_imprints_nothing():
    w_in = small("W_in")
    w_in.vjp_norms[ZERO] = 0
    table = page_of(w_in).tables[0]
    assert table[1][2] == Cell({})
    assert table[1][1].text and table[2][2].text


def test_a_weight_without_any_update_is_an_empty_table():
    w_in = small("W_in")
    w_in.vjp_norms.zero_()
    assert all(cell == Cell({}) for row in page_of(w_in).tables[0][1:] for cell in row[1:])


@pytest.mark.parametrize(
    "kind, hit, other_end", [("W_in", 0, 999), ("W_gate", 0, 999), ("W_out", 999, 0)]
)
def test_the_mark_is_where_the_target_ends_the_readout_that_counts(kind, hit, other_end):
    marked = small(kind)
    marked.target_ranks[0, 2], marked.target_ranks[1, 3] = hit, other_end
    table = page_of(marked).tables[0]
    hits = [(i, j) for i, row in enumerate(table) for j, cell in enumerate(row) if cell.is_hit]
    assert hits == [(3, 3)]


# ----- colour -----


def test_colour_grows_with_the_norm_up_to_the_largest_of_the_table():
    first, second = small("W_in"), small("W_out")
    norms = torch.tensor([[3e-5, 8.0, 0.02, 1.0], [0.3, 1e-3, 5.0, 0.1], [2.0, 4.0, 1e-4, 0.5]])
    first.vjp_norms.copy_(norms)
    second.vjp_norms.copy_(norms / 1000)
    page = page_of(first, second)
    for table in page.tables:
        levels = [[cell.level for cell in row[1:]] for row in reversed(table[1:])]
        order = torch.tensor(levels).flatten().argsort().tolist()
        assert order == norms.flatten().argsort().tolist()
        assert levels[0][1] == 100
        assert levels[0][3] == 50, "an eighth of the largest norm, on the cube-root scale"
        assert len({level for row in levels for level in row}) == 12
    assert "8 (cube-root scale)" in words(page.body)
    assert "0.008 (cube-root scale)" in words(page.body)


def palettes(html: str) -> dict[str, dict[str, str]]:
    """The colours of the light and of the dark mode."""
    light, dark = html.split("@media (prefers-color-scheme: dark)")
    return {
        mode: dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", css))
        for mode, css in (("light", light), ("dark", dark))
    }


def rgb(colour: str) -> torch.Tensor:
    return torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def test_contrast_by_the_rule():
    assert contrast(rgb("#ffffff"), rgb("#000000")) == pytest.approx(21)
    assert contrast(rgb("#767676"), rgb("#ffffff")) == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_stands_out_from_every_colour(mode):
    html = lens_page(result_of(small()))
    assert "color-mix(in srgb, var(--low), var(--high) var(--level))" in html
    colours = {name: rgb(value) for name, value in palettes(html)[mode].items()}
    cells = [torch.lerp(colours["low"], colours["high"], t / 20) for t in range(21)]
    for background in (colours["page"], *cells):
        assert contrast(colours["text"], background) >= 4.5
        assert contrast(colours["quiet"], background) >= 4.5
        assert contrast(colours["accent"], background) >= 3  # a graphic, not text
    assert contrast(cells[0], cells[-1]) > 1.5, "a scale that can be seen"


# ----- what a page must never do -----


def test_tokens_are_text_and_never_markup():
    attack = '<script>alert("x")</script>'
    hostile = small("W_out")
    hostile.vocabulary.update(dict.fromkeys(hostile.vocabulary, attack))
    result = replace(result_of(hostile), str_tokens=[attack] * 6, target=attack, loss_target=attack)
    html = lens_page(result)
    page = Page(html)
    assert "<script" not in html
    assert page.title.count(attack) == 7
    assert words(page.prompt).count(attack) == 7
    assert page.tables[0][0][1].tokens == [attack]
    assert page.tables[0][1][1].tokens == [attack, attack]
    assert page.tables[0][1][1].card.count(attack) == 6  # its token, the target, 2 + 2 tokens


def test_the_page_can_be_written_whatever_the_tokens():
    odd = replace(result_of(small()), str_tokens=["\ud83d", "\x00", "\u202e", "", "é", "�"])
    page = Page(lens_page(odd).encode().decode())
    assert words(page.prompt).startswith(r"\ud83d \x00 \u202e ∅ é �")


def test_the_page_needs_nothing_else():
    html = lens_page(result_of(small()))
    assert not re.search(r"http|//|url\(|@import|\bsrc=|\bhref=|<script|<link", html)


def test_a_page_of_thirty_layers_stays_small():
    big = [readout(kind, list(range(30)), 12, top_k=10) for kind in ("W_in", "W_out")]
    result = replace(
        result_of(*big), str_tokens=[" token"] * 12, positions=torch.arange(12), target=" Paris"
    )
    html = lens_page(result)
    assert [len(table) for table in Page(html).tables] == [31, 31]
    assert len(html.encode()) < 1_000_000


def test_without_jinja2_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'tl-backward[plot]'")):
        lens_page(result_of(small()))


# ----- tokens -----


@pytest.mark.parametrize(
    "token, shown",
    [
        (" Rome", "·Rome"),
        ("New York ", "New·York·"),
        ("\n\n", "⏎⏎"),
        ("\t", "⇥"),
        ("a\r\n", "a\\x0d⏎"),
        ("", "∅"),
        ("\x00\x1b\x7f", r"\x00\x1b\x7f"),
        ("\xa0", r"\xa0"),
        ("\u200b\u202e\u2028", r"\u200b\u202e\u2028"),
        ("\ud83d", r"\ud83d"),
        ("\U000e0001", r"\U000e0001"),
        ("�", "�"),
        ("·", "·"),
        ("\\", "\\"),
        ("naïve 東京 🗼", "naïve·東京·🗼"),
    ],
)
def test_visible(token, shown):
    assert visible(token) == shown


# ----- figures -----


def plain(text: str) -> str:
    """A label without the characters that isolate its tokens."""
    assert text.count("\u2068") == text.count("\u2069")
    return text.replace("\u2068", "").replace("\u2069", "")


def figure_of(kind: str, *readouts: Readout, weight: str | None = None):
    return result_of(*readouts).plot(kind, weight)


def test_the_table_figure_has_the_page_s_cells():
    (heatmap,) = figure_of("table", with_zero_row(small())).data
    assert list(heatmap.y) == ["6", "4", "1"]
    assert list(map(plain, heatmap.x)) == ["&lt;bos&gt; 0", "·Rome 2", "⏎ 3", "·in 5"]
    assert heatmap.z[0][1] is None and heatmap.text[0][1] == ""
    assert plain(heatmap.text[2][3]) == "W_out·0.3… \\<br>W_out·0.3…"
    hover = plain(heatmap.customdata[2][3])
    assert hover.startswith("<b>layer 1, ·in at 5</b><br>norm 7, of the VJP 0.273<br>")
    assert "target ·&lt;b&gt;: rank 503 of 1000" in hover
    assert "<b>most probable</b> (log prob)<br>-6.25 W_out·0.3·top0<br>" in hover
    assert hover.endswith("<br>-31.5 W_out·0.3·bottom1")


def test_the_target_is_bold_where_it_counts():
    marked, other = small("W_out"), small("W_in")
    marked.target_ranks[0, 2] = D_VOCAB - 1
    other.target_ranks[0, 2] = 0
    for weight, ends in (("W_out", ("", "<b>")), ("W_in", ("<b>", ""))):
        (heatmap,) = figure_of("table", marked, other, weight=weight).data
        bold = [text for row in heatmap.text for text in row if "<b>" in text]
        assert bold == [heatmap.text[2][2]]
        assert [end.startswith("<b>") for end in bold[0].split("<br>")] == list(map(bool, ends))


def test_rank_figure_has_a_line_for_every_position():
    lines = figure_of("ranks", with_zero_row(small())).data
    assert [plain(line.name) for line in lines][1:3] == ["·Rome 2 → ·&lt;b&gt;", "⏎ 3 → ·&lt;b&gt;"]
    assert list(lines[1].y) == [501, 505, None]
    assert [line.visible for line in lines] == ["legendonly"] * 3 + [True]
    assert list(lines[3].x) == ["1", "4", "6"]


def test_norm_figure_has_a_panel_for_every_weight():
    first, second = small("W_in"), small("W_out")
    first.norms.copy_(torch.linspace(0, 27, 12).view(3, 4))
    panels = figure_of("norms", first, second).data
    assert len(panels) == 2
    assert panels[0].z[0][3] == 1 and panels[0].z[2][0] != panels[0].z[2][0]
    assert panels[0].z[0][2] == pytest.approx((first.norms[2, 2].item() / 27) ** (1 / 3))
    assert panels[0].customdata[1][2] == pytest.approx(first.norms[1, 2].item())


def test_forward_and_backward_side_by_side():
    forward = replace(small("forward"), labels=["1_pre", "4_pre", "final_post"])
    figure = figure_of("forward_and_backward", small(), forward)
    assert [next(iter(panel.y)) for panel in figure.data] == ["final_post", "6"]
    with pytest.raises(ValueError, match="needs a lens run with forward=True"):
        figure_of("forward_and_backward", small())


@pytest.mark.parametrize("kind", ["table", "norms", "forward_and_backward"])
def test_columns_are_named_on_top_and_panels_where_they_begin(kind):
    token = " a token of many characters"
    result = replace(result_of(small("forward"), small()), str_tokens=[token] * 6)
    figure = result.plot(kind)
    assert [axis.side for axis in figure.select_xaxes()] == ["top"] * len(figure.data)
    assert [plain(name) for name in figure.data[0].x] == [f"·a·token·… {j}" for j in POSITIONS]
    if kind == "table":
        expected = [("<b>W_out</b>", "x domain")]
    else:
        expected = [("<b>forward</b>", "x domain"), ("<b>W_out</b>", "x2 domain")]
    assert [(title.text, title.xref) for title in figure.layout.annotations] == expected
    for title in figure.layout.annotations:
        assert (title.x, title.xanchor, title.y, title.yanchor) == (0, "left", 1, "bottom")
    assert figure.layout.title.x == 0 and figure.layout.title.xref == "paper"


def test_tokens_that_are_read_from_right_to_left_leave_a_label_in_its_order():
    token = "שלום"
    rtl = small()
    rtl.vocabulary.update(dict.fromkeys(rtl.vocabulary, token))
    result = replace(result_of(rtl), str_tokens=[token] * 6, target=token, loss_target=token)
    isolated = f"\u2068{token}\u2069"
    for kind in ("table", "ranks", "norms"):
        labels = json.dumps(json.loads(result.plot(kind).to_json()), ensure_ascii=False)
        assert token in labels and token not in labels.replace(isolated, "")
    (heatmap,) = result.plot().data
    assert heatmap.x[1] == f"{isolated} 2"
    assert heatmap.text[0][1] == f"{isolated} \\<br>{isolated}"


def test_hostile_tokens_are_no_markup_in_figures():
    attack = "<b onclick='x'>"
    hostile = small()
    hostile.vocabulary.update(dict.fromkeys(hostile.vocabulary, attack))
    result = replace(result_of(hostile), str_tokens=[attack] * 6, target=attack, loss_target=attack)
    for kind in ("table", "ranks", "norms"):
        assert "<b onclick" not in result.plot(kind).to_json()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("kind", "message"),
    [("pie", "kind must be 'table'"), ("forward_and_backward", "forward=True")],
)
def test_bad_figures(kind, message):
    with pytest.raises(ValueError, match=message):
        result_of(small()).plot(kind)


def test_tables_and_pages_need_tokens():
    empty = torch.zeros(3, 4, 0)
    without = replace(small(), top_ids=empty.long(), top_values=empty)
    for show in (lambda result: result.plot(), lens_page):
        with pytest.raises(ValueError, match="top_k and bottom_k of at least 1"):
            show(result_of(without))
    for kind in ("ranks", "norms"):
        assert result_of(without).plot(kind) == result_of(small()).plot(kind)


def test_without_plotly_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'tl-backward[plot]'")):
        result_of(small()).plot()


def test_several_prompts_are_shown_one_by_one():
    shared = small()
    several = {
        name: torch.stack([value, value], dim=1)
        for name, value in vars(shared).items()
        if isinstance(value, torch.Tensor)
    }
    result = replace(
        result_of(replace(shared, **several)),
        str_tokens=[PROMPT, PROMPT],
        positions=[torch.tensor(POSITIONS)] * 2,
        loss=torch.tensor([4.0, 2.0]),
        target_positions=[torch.tensor([5])] * 2,
        loss_target=[" <b>", " Rome"],
        loss_target_ids=[[3], [4]],
    )
    for show in (lambda result: result.plot(), lens_page):
        with pytest.raises(ValueError, match=r"use result.example\(b\)"):
            show(result)
    assert lens_page(result.example(0)) == lens_page(result_of(shared))
    assert "BackwardLensResult" in result._repr_html_()


def test_notebooks_show_the_outermost_tokens_of_the_last_position():
    hostile = small("W_in")
    hostile.vocabulary[int(hostile.top_ids[2, 3, 0])] = "<script>"
    shown = result_of(hostile, small("W_out"))._repr_html_()
    assert "<script>" not in shown and "&lt;script&gt;" in shown
    assert "W_out 2.3 bottom0" in shown and "W_out 2.2 bottom0" not in shown


def texts(table: list[list[Cell]]) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table]


def test_notebooks_show_weights_layer_by_layer():
    forward = replace(small("forward"), labels=["1_pre", "4_pre", "final_post"])
    result = result_of(with_zero_row(small("W_in")), small("W_out"), forward)
    weights, stream = map(texts, Page(result._repr_html_()).tables)
    assert weights[:2] == [["", "W_in", "W_out"], ["", *["top", "bottom"] * 2]]
    for i, (layer, row) in enumerate(zip(LAYERS, weights[2:], strict=True)):
        tokens = [f"{kind} {i}.3 {end}0" for kind in ("W_in", "W_out") for end in ("top", "bottom")]
        assert row == [str(layer), *map(repr, tokens)]
    assert [row[0] for row in stream[2:]] == forward.labels
    assert stream[4][1:] == ["'forward 2.3 top0'", "'forward 2.3 bottom0'"]


def test_notebooks_show_the_values_of_vocab():
    none = torch.zeros(3, 4, 0)
    vocab = replace(
        small(),
        top_ids=none.long(),
        top_values=none,
        bottom_ids=none.long(),
        bottom_values=none,
        vocab_ids=torch.tensor([1, 0]).expand(3, 4, 2),
        vocab_values=torch.arange(24.0).view(3, 4, 2),
    )
    (table,) = map(texts, Page(result_of(vocab)._repr_html_()).tables)
    assert table[1] == ["", "'W_out 0.0 top1'", "'W_out 0.0 top0'"]
    assert table[3] == ["4", "14", "15"]
