"""Low-rank updates merged: against the two products applied one after the other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medsa_deploy.errors import CheckpointError
from medsa_deploy.exporters.lora import merge

SIZES = st.integers(1, 12)


def tensors(**parts: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"layer.{name}": value for name, value in parts.items()}


@settings(max_examples=50)
@given(SIZES, SIZES, st.integers(1, 4), st.integers(0, 99))
def test_lora_is_applied_over_its_rank(out: int, inner: int, rank: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    w, a, b, x = (
        torch.randn(shape, generator=g)
        for shape in ((out, inner), (rank, inner), (out, rank), (3, inner))
    )
    merged, (update,) = merge(tensors(weight=w, lora_A=a, lora_B=b))
    torch.testing.assert_close(x @ merged["layer.weight"].T, x @ w.T + (x @ a.T) @ b.T / rank)
    assert (update.linear, update.rank) == ("layer", rank)
    assert set(merged) == {"layer.weight"}


@settings(max_examples=50)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 99))
def test_fused_qkv_adapts_first_and_last_third(width: int, rank: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    w, a, b, x = (
        torch.randn(shape, generator=g)
        for shape in ((3 * width, width), (2 * rank, width), (2 * width, rank), (5, width))
    )
    merged, (update,) = merge(tensors(weight=w, lora_A=a, lora_B=b))
    q, k, v = (x @ w.T).chunk(3, dim=-1)
    q = q + (x @ a[:rank].T) @ b[:width].T / rank
    v = v + (x @ a[rank:].T) @ b[width:].T / rank
    torch.testing.assert_close(x @ merged["layer.weight"].T, torch.cat([q, k, v], dim=-1))
    assert update.kind == "lora on first and last third"


@settings(max_examples=50)
@given(SIZES, SIZES, st.integers(1, 4), st.integers(0, 99))
def test_adalora_scales_the_rows_of_a(out: int, inner: int, rank: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    w, a, e, b, x = (
        torch.randn(shape, generator=g)
        for shape in ((out, inner), (rank, inner), (rank, 1), (out, rank), (3, inner))
    )
    parts = tensors(weight=w, lora_A=a, lora_B=b, lora_E=e, ranknum=torch.tensor([4.0]))
    merged, (update,) = merge(parts)
    expected = x @ w.T + (x @ (a * e).T) @ b.T / (4 + 1e-5)
    torch.testing.assert_close(x @ merged["layer.weight"].T, expected)
    assert update.kind == "adalora"


def test_nothing_to_merge_changes_nothing() -> None:
    originals = tensors(weight=torch.ones(2, 2), bias=torch.zeros(2))
    merged, updates = merge(originals)
    assert merged == originals
    assert updates == ()


LORA = {"weight": (4, 4), "lora_A": (2, 4), "lora_B": (4, 2)}
ADALORA = LORA | {"lora_E": (2, 1), "ranknum": (1,)}


def unit_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return tensors(**{name: torch.ones(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize(
    ("shapes", "lost"), [*((LORA, part) for part in LORA), *((ADALORA, part) for part in ADALORA)]
)
def test_a_missing_part_is_named(shapes: dict[str, tuple[int, ...]], lost: str) -> None:
    """Without lora_A nothing would be merged, without lora_E an AdaLoRA would pass for a LoRA."""
    parts = unit_weights(shapes)
    del parts[f"layer.{lost}"]
    with pytest.raises(CheckpointError, match=f"layer carries .* lacks layer.{lost}$"):
        merge(parts)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_A": (2, 5)},
        {"lora_A": (3, 4)},
        {"lora_B": (4, 3)},
        {"lora_B": (4,)},
        {"lora_B": (4, 0), "lora_A": (0, 4)},
        {"lora_E": (3, 1)},
        {"ranknum": (2,)},
        {"weight": (4, 4, 1, 1)},
    ],
)
def test_an_update_of_another_shape_is_refused(changes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(CheckpointError, match=r"^layer: its low-rank .* does not fit its weight"):
        merge(unit_weights(ADALORA | changes))


def test_an_update_that_is_not_finite_is_refused() -> None:
    parts = unit_weights(ADALORA) | {"layer.ranknum": torch.tensor([-1e-5], dtype=torch.float64)}
    with pytest.raises(CheckpointError, match=r"layer: its weight .* is NaN or infinite"):
        merge(parts)
