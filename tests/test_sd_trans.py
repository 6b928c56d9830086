"""SD-Trans's grouping: its inverse, the public reshape, the paper's windows, depth factors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medsa_deploy.bundle.manifest import DepthGrouping
from medsa_deploy.exporters.sd_trans import SDTrans, closest_factors

CHUNKS = st.integers(1, 9)


@pytest.mark.parametrize(
    ("d", "factors"),
    [
        (1, (1, 1)),
        (4, (1, 4)),
        (5, (1, 5)),
        (6, (2, 3)),
        (8, (2, 4)),
        (9, (1, 9)),
        (12, (3, 4)),
        (16, (2, 8)),
    ],
)
def test_closest_factors(d: int, factors: tuple[int, int]) -> None:
    assert closest_factors(d) == factors


@given(st.integers(1, 500))
def test_factors_multiply_to_the_depth(d: int) -> None:
    a, b = closest_factors(d)
    assert a * b == d


@given(CHUNKS, st.integers(1, 4), st.integers(1, 6), st.sampled_from(["public", "paper"]))
def test_ungroup_is_the_inverse(d: int, chunks: int, windows: int, grouping: DepthGrouping) -> None:
    sd_trans = SDTrans(grouping=grouping, chunk=d)
    x = torch.randn(chunks * d * windows, 2, 3, 5)
    assert torch.equal(sd_trans.ungroup(sd_trans.group(x, windows), windows), x)


@given(CHUNKS, st.integers(1, 3), st.integers(1, 6))
def test_paper_groups_one_window_across_slices(d: int, chunks: int, windows: int) -> None:
    """Entries are (slice, window): a group holds one window of d consecutive slices."""
    x = torch.tensor([(s, w) for s in range(chunks * d) for w in range(windows)])[:, None]
    groups = SDTrans(grouping="paper", chunk=d).group(x, windows)[:, 0]
    expected = [[(c * d + s, w) for s in range(d)] for c in range(chunks) for w in range(windows)]
    assert groups.tolist() == [[list(entry) for entry in group] for group in expected]


@given(CHUNKS, st.integers(1, 3), st.integers(1, 6))
def test_public_groups_consecutive_entries(d: int, chunks: int, windows: int) -> None:
    """The literal reshape: d consecutive windows, whichever slices they belong to."""
    entries = chunks * d * windows
    x = torch.arange(entries)[:, None, None]
    groups = SDTrans(grouping="public", chunk=d).group(x, windows)[:, 0, :, 0]
    assert torch.equal(groups, torch.arange(entries).view(-1, d))


def test_groupings_agree_in_global_blocks() -> None:
    x = torch.randn(12, 7, 3)
    public, paper = (SDTrans(grouping=g, chunk=4).group(x, 1) for g in ("public", "paper"))
    assert torch.equal(public, paper)
