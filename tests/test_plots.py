"""What the plots draw, for small models and for large ones."""

import io
import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from synthetic_reports import REST_BYTES, TRIALS, WIDTH, synthetic_report

from hf_mcsmoe.publishing.plots import PLOTS, draw_plots, plots_in, write_plots
from hf_mcsmoe.publishing.plots.auto_trials import draw_trials
from hf_mcsmoe.publishing.plots.expert_tree import expert_tree
from hf_mcsmoe.publishing.plots.layer_budget import draw_layers
from hf_mcsmoe.publishing.plots.model_sizes import draw_sizes
from hf_mcsmoe.publishing.plots.similarity_heatmap import draw_similarity
from hf_mcsmoe.publishing.plots.usage_heatmap import draw_usage

SIZES = [(4, 8), pytest.param((48, 128), marks=pytest.mark.slow)]


def values_of(report):
    """The report as a file gives it."""
    return json.loads(json.dumps(report.to_dict()))


def points(line):
    return np.asarray(line.get_ydata(), dtype=float)


@pytest.mark.parametrize("size", [(4, 8), (48, 128)], ids=str)
def test_usage_is_drawn_in_units_of_an_equal_share(size):
    report = synthetic_report(*size)
    figure = draw_usage(values_of(report), {})
    shown = figure.axes[0].images[0].get_array()
    assert shown.shape == size
    for row, layer in zip(np.asarray(shown), report.layers, strict=True):
        assert row == pytest.approx(np.array(layer.usage_frequency) * size[1])
    assert figure.axes[0].get_title(loc="right") == f"{size[0]} never chosen (grey)"
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert len(texts) == (32 if size == (4, 8) else 0)  # a number a cell, where there is room
    if texts:
        assert texts[1] == "0" and float(texts[0]) == pytest.approx(float(shown[0, 0]), abs=0.005)


def test_experts_never_chosen_are_below_the_colour_scale_and_missing_ones_blank():
    values = values_of(synthetic_report(2, 4))
    values["layers"][1]["usage_frequency"] = [0.5, 0.0, 0.5]
    image = draw_usage(values, {}).axes[0].images[0]
    assert np.isnan(np.ma.filled(image.get_array(), np.nan)[1, 3])
    colours = image.cmap(image.norm(image.get_array()))
    assert colours[1, 1].tolist() == image.cmap.get_under().tolist()
    assert colours[1, 3].tolist() == image.cmap.get_bad().tolist()
    assert colours[0, 0].tolist() not in (colours[1, 1].tolist(), colours[1, 3].tolist())


@pytest.mark.parametrize("size", [(4, 8), (48, 128)], ids=str)
def test_similarities_are_drawn_by_group(size):
    report = synthetic_report(*size)
    figure = draw_similarity(values_of(report), report.statistics)
    maps = [axes for axes in figure.axes if axes.images and axes.images[0].get_array().ndim == 2 and axes.patches]
    numbers = list(range(4)) if size == (4, 8) else [0, 9, 19, 28, 38, 47]
    assert len(maps) == len(numbers)
    for axes, number in zip(maps, numbers, strict=True):
        layer = report.layers[number]
        groups = np.array(layer.group_of_expert)
        similarity = report.statistics[f"{layer.layer}.similarity"].double().numpy()
        order = expert_tree(similarity, groups).order
        assert sorted(order) == list(range(size[1]))
        assert np.array_equal(axes.images[0].get_array(), similarity[np.ix_(order, order)])
        frames = [(frame.get_x() + 0.5, frame.get_width()) for frame in axes.patches]
        expected = [g for g in np.unique(groups) if (groups == g).sum() > 1]
        assert len(frames) == len(expected)
        for start, width in frames:
            (group,) = set(groups[order[int(start) : int(start + width)]])
            assert (groups == group).sum() == width
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    assert titles[-1] == f"decoder layer {numbers[-1]}: {size[1]} → {report.layers[-1].num_experts_after}"
    assert any("router logits" in axes.get_xlabel() for axes in figure.axes)


def joins_by_hand(similarity, groups):
    """Average linkage, groups first, pair by pair: (distance, members, within a group) of each join."""
    clusters = [frozenset([expert]) for expert in range(len(groups))]
    found = []
    while len(clusters) > 1:
        pairs = [(a, b) for i, a in enumerate(clusters) for b in clusters[i + 1 :]]
        within = [(a, b) for a, b in pairs if len({groups[e] for e in a | b}) == 1 and groups[min(a)] >= 0]
        mean = {(a, b): np.mean([1 - similarity[x, y] for x in a for y in b]) for a, b in within or pairs}
        a, b = min(mean, key=mean.get)
        found.append((mean[a, b], a | b, bool(within)))
        clusters = [c for c in clusters if c not in (a, b)] + [a | b]
    return found


@pytest.mark.parametrize("seed", range(4))
def test_the_tree_joins_groups_first_by_average_distance(seed):
    generator = np.random.default_rng(seed)
    similarity = generator.uniform(-1, 1.2, (9, 9))
    similarity = (similarity + similarity.T) / 2
    groups = np.array([0, 2, 1, 2, -1, 0, 2, -1, 1])
    tree = expert_tree(similarity, groups)
    expected = joins_by_hand(similarity, groups)
    place = np.argsort(tree.order)
    span = {frozenset(members): (min(place[list(members)]), max(place[list(members)])) for _, members, _ in expected}
    for members, (first, last) in span.items():
        assert last - first == len(members) - 1, "the experts of a join stand side by side"
    drawn = sorted(zip(tree.links[:, 1, 1], tree.is_within_group, strict=True))
    assert np.allclose([height for height, _ in drawn], sorted(height for height, _, _ in expected))
    assert [within for _, within in drawn] == [within for _, _, within in sorted(expected, key=lambda join: join[0])]
    # Each bracket stands on its two branches: on a leaf at 0, or on the middle of the bracket below.
    feet = {(round(x, 9), round(y, 9)) for link in tree.links for x, y in (link[0], link[3])}
    tops = {(round((link[1, 0] + link[2, 0]) / 2, 9), round(link[1, 1], 9)) for link in tree.links}
    leaves = {(float(number), 0.0) for number in range(9)}
    assert feet - leaves <= tops and len(tops - feet) == 1


def test_groups_that_are_a_cut_of_the_tree_leave_it_as_it_is():
    points = torch.randn(20, 3, generator=torch.Generator().manual_seed(1)).double().numpy()
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    plain = linkage(squareform(distance, checks=False), "average")
    tree = expert_tree(1 - distance, fcluster(plain, 6, "maxclust") - 1)
    assert np.allclose(np.sort(tree.links[:, 1, 1]), plain[:, 2])
    assert tree.is_within_group.sum() == 20 - 6


def test_layers_show_budgets_and_errors():
    report = synthetic_report(4, 8, narrowed=True)
    figure = draw_layers(values_of(report), {})
    experts, neurons, errors = figure.axes
    heights = [[bar.get_height() for bar in bars] for bars in experts.containers]
    assert heights == [[8] * 4, [layer.num_experts_after for layer in report.layers]]
    heights = [[bar.get_height() for bar in bars] for bars in neurons.containers]
    assert heights == [[8 * WIDTH] * 4, [sum(layer.widths) for layer in report.layers]]
    before, after = errors.lines
    assert points(before).tolist() == [0.5] * 4
    assert points(after)[:3].tolist() == [layer.relative_error for layer in report.layers[:3]]
    assert np.isnan(points(after)[3])


def test_without_narrowing_there_is_no_panel_of_neurons():
    figure = draw_layers(values_of(synthetic_report(48, 128)), {})
    experts, errors = figure.axes
    assert len(experts.containers[1]) == 48 and len(errors.lines) == 1 and errors.get_yscale() == "log"
    assert experts.get_ylabel() == "experts" and "|new - old|² / |old|²" in errors.get_ylabel()


def test_sizes_add_up():
    report = synthetic_report(4, 8)
    axes = draw_sizes(values_of(report), {}).axes[0]
    widths = [[bar.get_width() for bar in bars] for bars in axes.containers]
    experts = [sum(getattr(layer, f"bytes_{time}") for layer in report.layers) for time in ("before", "after")]
    assert np.allclose(np.array(widths) * 1e6, [experts, [REST_BYTES] * 2])
    assert [bar.get_x() * 1e6 for bar in axes.containers[1]] == pytest.approx(experts)
    assert "(MB)" in axes.get_xlabel()
    shown = [text.get_text() for text in axes.texts]
    share = report.total_bytes_after / report.total_bytes_before
    assert shown[0].endswith(" MB") and shown[1].endswith(f"({share:.1%})")


def test_trials_are_ordered_by_their_distance():
    axes = draw_trials(values_of(synthetic_report(1, 4, tried=TRIALS)), {}).axes[0]
    assert [bar.get_width() for bar in axes.containers[0]] == [0.125, 0.625]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["joint-obs, refit=least_squares", "m-smoe, alignment=None"]
    assert [text.get_text() for text in axes.texts] == ["0.1250 chosen", "0.6250"]


def test_what_is_not_there_is_not_drawn():
    report = synthetic_report(2, 4)
    assert draw_similarity(values_of(report), {}) is None
    assert draw_trials(values_of(report), {}) is None
    empty = values_of(synthetic_report(1, 4)) | {"layers": []}
    assert draw_usage(empty, {}) is None and draw_layers(empty, {}) is None


def test_layers_of_irregular_names_are_numbered_by_position():
    values = values_of(synthetic_report(3, 4))
    for layer, name in zip(values["layers"], ("encoder.1.mlp", "encoder.3.mlp", "decoder.1.$a$.mlp"), strict=True):
        layer["layer"] = name
    figure = draw_usage(values, {})
    assert figure.axes[0].get_ylabel() == "position of the MoE layer"
    figure.savefig(io.BytesIO())  # no formula is made of the dollar signs


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_files_are_pictures(size, tmp_path):
    report = synthetic_report(*size, tried=TRIALS)
    settings = dict(plt.rcParams)
    drawn = draw_plots(values_of(report), report.statistics)
    assert plt.get_fignums() == [] and dict(plt.rcParams) == settings
    assert list(drawn) == [plot.file for plot in PLOTS]
    write_plots(drawn, tmp_path)
    for name in drawn:
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG" and picture.width == 960 and 150 < picture.height < 1500
    assert [plot.file for plot in plots_in(drawn)] == list(drawn)
    write_plots({"plots/usage.png": b"x"}, tmp_path)
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["usage.png"]


@pytest.mark.slow
def test_the_same_report_gives_the_same_bytes():
    report = synthetic_report(1, 3, tried=TRIALS)
    values = values_of(report)
    assert draw_plots(values, report.statistics) == draw_plots(values, dict(reversed(report.statistics.items())))
