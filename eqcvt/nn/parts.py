"""Blocks whose parts are read, not called: one op does what they would do."""

from __future__ import annotations

from torch import nn

from eqcvt.nn.norm import BatchNorm, LayerNorm

_KNOWN = {kind.forward for kind in (nn.Linear, BatchNorm, LayerNorm)}


def check_parts(block: nn.Module, *names: str) -> None:
    """Refuse parts that would do more than hold their parameters, which nothing would run.

    Parametrizations (``torch.nn.utils.parametrize``) are read, and hooks that only look on are
    passed over.

    Raises:
        TypeError: a part that was replaced, as low-rank adapters, quantisation and torch's
            ``SyncBatchNorm`` do, that was given another ``forward``, or whose weight a hook makes,
            as pruning does.
    """
    for name in names:
        part: nn.Module = getattr(block, name)
        kind = type(part)
        if kind.forward not in _KNOWN or "forward" in part.__dict__:
            what = "its own forward" if "forward" in part.__dict__ else kind.__name__
            advice = "a change of its weights can be a torch.nn.utils.parametrize parametrization"
            if isinstance(part, nn.SyncBatchNorm):
                advice = "eqcvt.nn.set_sync_batch_norm(model, group) makes processes share theirs"
            raise TypeError(
                f"{type(block).__name__} reads the parameters of {name!r} and never calls it, so "
                f"what {what} does would be left out: keep the part as it was; {advice}"
            )
        if part._forward_pre_hooks and "weight" in part.__dict__:
            raise TypeError(
                f"{type(block).__name__} reads the parameters of {name!r} and never calls it, so "
                "the hook that makes its weight would not run: take torch.nn.utils.parametrize, "
                "or make the change permanent (torch.nn.utils.prune.remove)"
            )
