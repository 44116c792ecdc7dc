"""What ranks tell each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peftcli.dist import ranks as module
from peftcli.dist.ranks import Ranks
from tests.dist.conftest import Together


def test_one_process_is_all_ranks() -> None:
    ranks, x = Ranks(), torch.ones(2)
    ranks.sum_([x])
    assert x.tolist() == [1, 1]
    assert ranks.is_main
    assert ranks.part([1, 2, 3]) == [1, 2, 3]
    assert ranks.totals(1, 2.5) == (1, 2.5)
    assert ranks.exchange("a") == ["a"]
    assert ranks.most(3) == 3


def speak(ranks: Ranks) -> dict[str, Any]:
    """Everything that ranks can say, once."""
    mine = float(ranks.rank + 1)
    tensors = [torch.full((2, 3), mine), torch.full((), mine), torch.full((4,), ranks.rank)]
    ranks.sum_(tensors)
    wholes = [torch.empty(4, 2), torch.empty(2), torch.empty(7)]  # rows of three ranks: 2 2 0 ...
    ranks.join_(wholes, [torch.full_like(ranks.rows(whole), mine) for whole in wholes])
    summed = ranks.sum_rows(torch.arange(10.0).view(5, 2) * mine)
    copied = [torch.full((3,), mine), torch.tensor([ranks.rank == 0])]
    ranks.copy_main_(copied)
    return {
        "parts": ranks.part(range(5)),
        "sums": [t.unique().item() for t in tensors],
        "joined": [whole.tolist() for whole in wholes],
        "summed": summed.tolist(),
        "copied": [t.unique().item() for t in copied],
        "totals": ranks.totals(0.1, ranks.rank),
        "most": ranks.most(7 - ranks.rank),
        "said": ranks.exchange({"rank": ranks.rank, "third": 1 / 3, "text": "x" * ranks.rank}),
    }


@pytest.mark.parametrize("bucket", [2**25, 5])
def test_all_ranks_hear_the_same(
    bucket: int, together: Together, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BUCKET", bucket)
    heard = together(3, speak)
    assert [list(h.pop("parts")) for h in heard] == [[0], [1, 2], [3, 4]]
    summed = [row for h in heard for row in h.pop("summed")]
    assert summed == (torch.arange(10.0).view(5, 2) * 6).tolist()
    assert heard[0] == heard[1] == heard[2]
    assert heard[0]["sums"] == [6, 6, 3]
    assert heard[0]["joined"] == [[[1, 1], [1, 1], [2, 2], [2, 2]], [1, 2], [1, 1, 1, 2, 2, 2, 3]]
    assert heard[0]["copied"] == [1, True]
    assert heard[0]["totals"] == (pytest.approx(0.3), 3)
    assert heard[0]["most"] == 7
    assert [h["rank"] for h in heard[0]["said"]] == [0, 1, 2]
    assert heard[0]["said"][1]["third"] == 1 / 3
