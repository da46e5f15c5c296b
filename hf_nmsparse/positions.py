"""How many tokens a model of torch has positions for."""

from __future__ import annotations

from torch import nn

__all__ = ["positions_of"]


def positions_of(part: nn.Module) -> int | None:
    """How many tokens an encoder or a decoder has positions for; None where it makes them as they are needed.

    Only a table has an end: T5's positions are relative, and M2M100, NLLB and FSMT compute theirs anew.
    """
    tables = [
        table
        for name, table in part.named_modules()
        if isinstance(table, nn.Embedding)
        and ("position" in name.rpartition(".")[2] or name.endswith("wpe"))
        and not hasattr(table, "make_weight")
    ]
    # BART leaves out the first rows, RoBERTa those up to the row of padding.
    return min((len(table.weight) - _rows_left_out(table) for table in tables), default=None)


def _rows_left_out(table: nn.Embedding) -> int:
    offset: int = getattr(table, "offset", 0)
    return offset if table.padding_idx is None else table.padding_idx + 1
