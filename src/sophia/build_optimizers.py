"""The table of optimizers: what each name builds from settings and parameter groups."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from sophia import SophiaG, SophiaH, SophiaK
from sophia.config import OptimizerSettings
from sophia.curvature import GaussNewtonBartlett, Hutchinson
from sophia.foreign import build_foreign
from sophia.meaning import MATRIX_SETTINGS, estimates_curvature
from sophia.optim.lion import Lion
from sophia.optim.matrix_groups import ADAM_BETAS
from sophia.optim.soap import LARGEST, SOAP
from sophia.parameter_groups import NamedParameters, parameter_groups

Groups = list[dict[str, Any]]
Parts = list[torch.optim.Optimizer]

# torch's NAdam has μ_t = β1 (1 − ½ 0.96^(t ψ)): with this ψ it is β1 in all steps.
_HELD = 1e6
_FUSED = "queries_keys_values.weight"
_PRODUCTS: Mapping[str, Any] = {"auto": "auto", "fp32": None, "bf16": torch.bfloat16}


def build(settings: OptimizerSettings, named: NamedParameters, seed: int) -> Parts:
    """The optimizers that together update all named parameters, once each.

    Args:
        settings: Resolved.
        named: What is to be trained.
        seed: Of curvature noise.

    Raises:
        ValueError: A setting does not fit the parameters, or an import path names no optimizer that can be used.
    """
    groups = parameter_groups(settings, named)
    if settings.is_foreign:
        return [build_foreign(settings, groups)]
    return BUILDERS[settings.optimizer](settings, groups, seed)


def _adamw(settings: OptimizerSettings, groups: Groups, seed: int) -> Parts:
    return [torch.optim.AdamW(groups, lr=_lr(settings), betas=_betas(settings), fused=_can_fuse(groups))]


def _nadamw(settings: OptimizerSettings, groups: Groups, seed: int) -> Parts:
    """Nesterov's momentum in AdamW, held as most of the field holds it; torch's schedule of it is not the paper's."""
    held: dict[str, Any] = {"decoupled_weight_decay": True, "momentum_decay": _HELD}
    return [torch.optim.NAdam(groups, lr=_lr(settings), betas=_betas(settings), **held)]


def _lion(settings: OptimizerSettings, groups: Groups, seed: int) -> Parts:
    return [Lion(groups, lr=_lr(settings), betas=_betas(settings))]


def _signum(settings: OptimizerSettings, groups: Groups, seed: int) -> Parts:
    """The sign of the momentum: Lion with one decay for both of its averages."""
    assert settings.beta1 is not None
    return [Lion(groups, lr=_lr(settings), betas=(settings.beta1, settings.beta1))]


def _muon(settings: OptimizerSettings, groups: Groups, seed: int) -> Parts:
    """Muon on the blocks' matrices; AdamW on embeddings and vectors, at the same learning rate.

    One learning rate serves both, because Muon's update is scaled to the root mean square of AdamW's ("Muon is Scalable
    for LLM Training", arXiv 2502.16982).
    """
    matrices, others = _split(groups)
    betas: Any = (0.9, settings.beta2)  # of AdamW; Muon's momentum is its own
    adamw = torch.optim.AdamW(others, lr=_lr(settings), betas=betas, fused=_can_fuse(others))
    momentum = settings.beta1 or 0.0
    muon = torch.optim.Muon(matrices, lr=_lr(settings), momentum=momentum, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw]


def _split(groups: Groups) -> tuple[Groups, Groups]:
    """Hidden layers' matrices, and all else."""
    matrices: Groups = []
    others: Groups = []
    for group in groups:
        for wanted, chosen in ((True, matrices), (False, others)):
            params = [(n, p) for n, p in group["params"] if (p.ndim == 2 and "blocks." in n) is wanted]
            if params:
                chosen.append({**group, "params": params})
    return matrices, others


def _soap(settings: OptimizerSettings, groups: Groups, seed: int) -> Parts:
    """SOAP on all parameters; dimensions that only the embeddings have (the vocabulary) are not turned."""
    inside = [max(p.shape) for group in groups for name, p in group["params"] if p.ndim == 2 and "blocks." in name]
    largest = min(max(inside, default=1), LARGEST)
    interval = settings.basis_interval
    return [SOAP(groups, lr=_lr(settings), betas=_betas(settings), basis_interval=interval, max_precond_dim=largest)]


def _sophia_g(settings: OptimizerSettings, groups: Groups, seed: int) -> Parts:
    estimator = GaussNewtonBartlett(noise=settings.curvature_noise or "labels")
    return [SophiaG(groups, **_sophia(settings, seed), **_diagonal(settings), estimator=estimator)]


def _sophia_h(settings: OptimizerSettings, groups: Groups, seed: int) -> Parts:
    # The form that works under DDP and FSDP2, too: one number of ranks gives the curvature of another.
    estimator = Hutchinson(product="finite_difference")
    return [SophiaH(groups, **_sophia(settings, seed), **_diagonal(settings), estimator=estimator)]


def _sophia_k(settings: OptimizerSettings, groups: Groups, seed: int) -> Parts:
    """Sophia-K on the blocks' matrices; on embeddings and vectors Adam's rule with betas of its own."""
    matrices, others = _split(groups)
    own: Groups = [{**group, "hidden": True} for group in matrices]
    entrywise = settings.basis == "none" and settings.orthogonalize == 0
    if settings.split_qkv and not (entrywise and settings.update_rms == 0):
        own = [one for group in own for one in _with_split(group)]
    betas = {} if settings.others == "curvature" else {"betas": ADAM_BETAS}
    own += [{**group, "hidden": False, **betas} for group in others]
    names = [name for name in MATRIX_SETTINGS if name not in ("split_qkv", "product_dtype")]
    chosen: dict[str, Any] = {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}
    if settings.product_dtype is not None and not (entrywise and settings.product_dtype == "auto"):
        chosen["product_dtype"] = _PRODUCTS[settings.product_dtype]
    if settings.update_rms == 0:
        chosen["update_rms"] = None
    estimator = None  # none, where it would have no effect
    if estimates_curvature("sophia-k", vars(settings)):
        estimator = GaussNewtonBartlett(noise=settings.curvature_noise or "signs")
    return [SophiaK(own, **_sophia(settings, seed), **chosen, estimator=estimator)]


def _with_split(group: dict[str, Any]) -> Groups:
    """A group of matrices, and apart from it those of queries, keys and values, which are three."""
    fused = [(name, p) for name, p in group["params"] if name.endswith(_FUSED)]
    rest = [(name, p) for name, p in group["params"] if not name.endswith(_FUSED)]
    return [
        *([{**group, "params": rest}] if rest else []),
        *([{**group, "params": fused, "split": 3}] if fused else []),
    ]


def _diagonal(settings: OptimizerSettings) -> dict[str, Any]:
    """What only the optimizers with one basis have."""
    return {"clip_target": settings.clip_target, "bias_correction": settings.bias_correction}


def _sophia(settings: OptimizerSettings, seed: int) -> dict[str, Any]:
    return {
        "lr": _lr(settings),
        "betas": _betas(settings),
        "gamma": settings.gamma,
        **({} if settings.eps is None else {"eps": settings.eps}),
        "seed": seed,
        "curvature_interval": settings.curvature_interval,
        "state_dtype": torch.bfloat16 if settings.state_dtype == "bf16" else None,
    }


Builder = Callable[[OptimizerSettings, Groups, int], Parts]
BUILDERS: Mapping[str, Builder] = MappingProxyType(
    {
        "adamw": _adamw,
        "nadamw": _nadamw,
        "lion": _lion,
        "signum": _signum,
        "muon": _muon,
        "soap": _soap,
        "sophia-g": _sophia_g,
        "sophia-h": _sophia_h,
        "sophia-k": _sophia_k,
    }
)


def _lr(settings: OptimizerSettings) -> float:
    assert settings.lr is not None
    return settings.lr


def _betas(settings: OptimizerSettings) -> tuple[float, float]:
    assert settings.beta1 is not None
    assert settings.beta2 is not None
    return settings.beta1, settings.beta2


def _can_fuse(groups: Groups) -> bool:
    return all(p.device.type in ("cpu", "cuda") for group in groups for _, p in group["params"])
