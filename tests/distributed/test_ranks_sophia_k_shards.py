"""SophiaK on shards (FSDP2, HSDP) is SophiaK in one process, and what a basis needs is on one rank alone."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional as F

from sophia import SophiaG, SophiaK
from sophia.curvature import GaussNewtonBartlett
from tests.distributed import engines

CHUNK = 4  # rows of a chunk, on all ranks together
SETTINGS = {"lr": 0.02, "curvature_interval": 2, "seed": 6}
# Eigenvectors of statistics whose sums were taken in another order.
CLOSE = {"rtol": 1e-8, "atol": 1e-10}
STOP, END = 3, 6


def groups(model):
    """The hidden matrices are (5, 6), of uneven shards on two ranks, and (6, 5); on four one shard of each is empty."""
    named = engines.parameters(model)
    hidden = [p for name, p in named.items() if name.startswith("block.")]
    return [
        {"params": hidden},
        {"params": [p for p in named.values() if all(p is not q for q in hidden)], "hidden": False},
    ]


def cut_rows(groups):
    """The matrix of six rows is three of two."""
    first, rest = groups
    fused = [p for p in first["params"] if tuple(p.shape) == (6, 5)]
    others = [p for p in first["params"] if tuple(p.shape) != (6, 5)]
    assert len(fused) == 1
    return [{"params": others}, {"params": fused, "split": 3}, rest]


def begin(engine, seed=0, kind=SophiaK, dtype=torch.float64, fused=False, **settings):
    options = {"find_unused_parameters": True} if engine == "ddp" else {}
    model = engines.build(dtype, seed=seed)
    with torch.no_grad():  # else the curvature of the normalized inputs is singular, and its basis a matter of rounding
        model.block.norm.bias += torch.linspace(0.2, 1.0, engines.WIDTH)
    model = engines.wrap(engine, model, **options)
    given = groups(model) if kind is SophiaK else engines.parameters(model).values()
    given = cut_rows(given) if fused else given
    return model, kind(given, **{**SETTINGS, **settings})


def forwards(model, tokens, spoilt=None):
    """One for each chunk, and the rows that this rank has of them."""
    rank, world = engines.place()
    rows = [
        [row for row in range(first, first + CHUNK) if row % world == rank] for first in range(0, len(tokens), CHUNK)
    ]

    def forward(own):
        logits = model(tokens[own])
        if spoilt == rank:
            logits.register_hook(lambda gradient: gradient * torch.nan)
        return logits

    return [lambda own=own: forward(own) for own in rows], [row for own in rows for row in own]


def backward(model, step):
    tokens, targets = engines.batch(step)
    own = engines.own_rows()
    F.cross_entropy(model(tokens[own]).flatten(0, 1), targets[own].flatten()).backward()


def advance(model, optimizer, first, last):
    for step in range(first, last):
        calls, rows = forwards(model, engines.batch(step)[0])
        optimizer.refresh_curvature(calls, rows=rows)
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def everything(model, optimizer):
    """Parameters and state, whole, by name; bases up to the signs of their columns."""
    found = engines.snapshot(model)
    names = {p: name for name, p in engines.parameters(model).items()}
    saved = optimizer.state_dict()
    for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        for index, p in zip(group["params"], own["params"], strict=True):
            for key, part in saved["state"].get(index, {}).items():
                value = engines.whole(part)
                found[f"{names[p]}.{key}"] = value.abs() if key.endswith("_basis") else value
    return found


def train(engine, settings, last=5):
    model, optimizer = begin(engine, **settings)
    advance(model, optimizer, 0, last)
    return everything(model, optimizer)


RULES = [
    {},
    {"basis": "both", "orthogonalize": 0, "nu": 1.0},
    {"basis": "none", "others": "curvature"},
    {"basis": "both", "others": "curvature", "update_rms": None, "nesterov": False},
    {"basis": "both", "factors": "gradients", "diagonal": "gradients", "exponent": 0.5},
    {"basis": "both", "diagonal": "gradients", "orthogonalize": 0, "maximize": True},
    {"factors": "gradients", "others": "curvature"},
    {"basis": "none", "diagonal": "gradients", "curvature_interval": 10, "nu": 0.0},
    {"basis": "both", "fused": True},
    {"fused": True, "factors": "gradients", "diagonal": "gradients", "exponent": 0.5},
]


@pytest.mark.parametrize("settings", RULES, ids=str)
def test_shards_are_one_process_with_the_whole_batch(ranks, settings):
    expected = train("none", settings)
    for found in ranks.run(train, "fsdp", settings):
        engines.assert_same(found, expected, **CLOSE)


@pytest.mark.parametrize(("engine", "settings"), [("fsdp", RULES[3]), ("fsdp", RULES[4]), ("hsdp", RULES[2])], ids=str)
def test_empty_shards_and_replicated_shards(ranks, settings, engine):
    expected = train("none", settings)
    for found in ranks.run(train, engine, settings, world=4):
        engines.assert_same(found, expected, **CLOSE)


def held(engine, settings):
    """Elements of what this rank holds of matrices, by shape and name, after training and after loading."""
    model, optimizer = begin(engine, **settings)
    advance(model, optimizer, 0, 3)
    heir = SophiaK([{"params": group["params"]} for group in optimizer.param_groups])  # all settings are loaded
    heir.load_state_dict(optimizer.state_dict())
    found = []
    for one in (optimizer, heir):
        state = {tuple(p.shape): own for p, own in one.state.items() if p.ndim == 2}
        found.append(
            {
                shape: {key: (v.to_local() if isinstance(v, DTensor) else v).numel() for key, v in own.items()}
                for shape, own in state.items()
            }
        )
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize("settings", [{"basis": "both"}, {"basis": "both", "diagonal": "gradients"}], ids=str)
def test_one_rank_alone_holds_what_a_basis_needs(ranks, settings):
    first, second = ranks.run(held, "fsdp", settings)
    diagonal = "exp_avg_sq" if "diagonal" in settings else "hessian"
    squares = {"row_statistics": (0, 0), "row_basis": (0, 0), "column_statistics": (1, 1), "column_basis": (1, 1)}
    for shape, (owner, other) in {(5, 6): (first, second), (6, 5): (second, first)}.items():
        assert owner[shape].keys() == {"step", "refreshes", "exp_avg", diagonal, *squares}
        assert other[shape].keys() == {"step", "refreshes", "exp_avg"}
        assert owner[shape]["exp_avg"] + other[shape]["exp_avg"] == owner[shape][diagonal] == 30
        assert all(owner[shape][name] == shape[a] * shape[b] for name, (a, b) in squares.items())


def refuse(when):
    model, optimizer = begin("fsdp", basis="both", others="curvature")
    advance(model, optimizer, 0, when)
    before = everything(model, optimizer)
    accepted = optimizer.refresh_curvature(forwards(model, engines.batch(when)[0], spoilt=1)[0])
    after = everything(model, optimizer)
    engines.assert_same({name: after[name] for name in before}, before)
    refused = optimizer.param_groups[0]["refused_refreshes"]
    advance(model, optimizer, when, when + 1)  # still due
    return accepted, refused, optimizer.refreshes


@pytest.mark.parametrize("when", [0, 2])
def test_what_one_rank_refuses_all_refuse(ranks, when):
    assert ranks.run(refuse, when) == [(False, 1, when // 2 + 1)] * 2


def by_hand(engine, settings):
    """Sampled gradients from nowhere, the same on all ranks; one of them too large in the end."""
    model, optimizer = begin(engine, **settings)
    source = torch.Generator().manual_seed(3)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(3):
        estimates = []
        for p in params:
            stacked = p.ndim == 2 and tuple(p.shape) != (engines.VOCAB, engines.WIDTH)
            shape = (7, *p.shape) if stacked else tuple(p.shape)
            one = torch.randn(shape, generator=source, dtype=torch.float64).mul_(0.1)
            if not stacked:
                one.square_()
                one = distribute_tensor(one, p.device_mesh, p.placements) if isinstance(p, DTensor) else one
            estimates.append(one)
        if step == 2:
            estimates[2][-1, -1, 0] = torch.inf
        assert optimizer.update_curvature(estimates) == (step < 2)
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    return everything(model, optimizer)


def test_curvature_by_hand(ranks):
    settings = {"basis": "both", "others": "curvature"}
    expected = by_hand("none", settings)
    for found in ranks.run(by_hand, "fsdp", settings):
        engines.assert_same(found, expected, **CLOSE)


def attached():
    model, optimizer = begin("fsdp", estimator=GaussNewtonBartlett(noise="signs", chunks=2))
    optimizer.attach(model)
    for step in range(3):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    return everything(model, optimizer)


def test_attached(ranks):
    first, second = ranks.run(attached)
    engines.assert_same(second, first)
    assert first["block.up.weight.refreshes"] == 2
    assert all(torch.isfinite(value).all() for value in first.values())


def forget():
    model, optimizer = begin("fsdp")
    backward(model, 0)
    with pytest.raises(RuntimeError, match="step\\(\\) without a curvature refresh"):
        optimizer.step()


def test_a_forgotten_refresh(ranks):
    ranks.run(forget)


def figures(engine, settings):
    model, optimizer = begin(engine, **settings)
    advance(model, optimizer, 0, 4)
    own = {name: float(value) for name, value in optimizer.stats().items()} if engines.place()[0] == 0 else {}
    return {name: float(value) for name, value in optimizer.stats(reduce=True).items()}, own


@pytest.mark.parametrize(
    ("engine", "world", "settings"),
    [("fsdp", 2, {}), ("hsdp", 4, {"others": "curvature"}), ("ddp", 2, {"others": "curvature"})],
)
def test_stats_of_all_shards(ranks, engine, world, settings):
    """Without `reduce` no rank waits for another."""
    expected, _ = figures("none", settings)
    assert 0.01 < expected["clip_fraction"] < 0.99
    found = ranks.run(figures, engine, settings, world=world)
    for reduced, _ in found:
        assert reduced == pytest.approx(expected, rel=1e-5)
    own = found[0][1]
    assert engine == "ddp" or 0 < own["momentum_norm"] < expected["momentum_norm"]
    assert engine == "ddp" or 0 < own["curvature_norm"] < expected["curvature_norm"]


def grow(engine):
    """A group that is added later, whose matrix leaves the one before where it is."""
    model, _ = begin(engine)
    first, rest = groups(model)
    late = {"params": [p for p in first["params"] if tuple(p.shape) == (engines.HIDDEN, engines.WIDTH)]}
    first["params"] = [p for p in first["params"] if p is not late["params"][0]]
    optimizer = SophiaK([first, rest], **SETTINGS, basis="both")
    advance(model, optimizer, 0, 3)
    optimizer.add_param_group(late)
    advance(model, optimizer, 3, 6)
    return everything(model, optimizer)


def test_a_group_added_later(ranks):
    expected = grow("none")
    for found in ranks.run(grow, "fsdp"):
        engines.assert_same(found, expected, **CLOSE)


# ---- checkpoints


def save(engine, folder, flatten, settings):
    model, optimizer = begin(engine, **settings)
    advance(model, optimizer, 0, STOP)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    state = {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    dcp.save(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    return everything(model, optimizer)


def resume(engine, folder, flatten, settings):
    """On other initial weights: what was loaded, and the end of the run."""
    model, optimizer = begin(engine, seed=1, **settings)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    state = {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_model_state_dict(model, state["model"], options=options)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    loaded = everything(model, optimizer)
    advance(model, optimizer, STOP, END)
    return loaded, everything(model, optimizer)


CURVATURE, GRADIENTS = {"basis": "both", "others": "curvature"}, RULES[4]


@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")  # one process is what is meant
@pytest.mark.parametrize(
    ("saver", "savers", "loader", "loaders", "settings", "flatten"),
    [
        ("fsdp", 2, "fsdp", 2, GRADIENTS, True),
        ("fsdp", 2, "fsdp", 4, CURVATURE, True),
        ("fsdp", 2, "none", 1, CURVATURE, False),
        ("none", 1, "fsdp", 2, CURVATURE, True),
        ("none", 1, "fsdp", 2, GRADIENTS, False),
        ("hsdp", 4, "ddp", 2, CURVATURE, False),
    ],
)
def test_reloads_on_another_number_of_ranks(ranks, tmp_path, saver, savers, loader, loaders, settings, flatten):
    def on(world, function, *args):
        return [function(*args)] if world == 1 else ranks.run(function, *args, world=world)

    given = (str(tmp_path), flatten, settings)
    saved = on(savers, save, saver, *given)[0]
    expected = train("none", settings, END)
    for loaded, final in on(loaders, resume, loader, *given):
        engines.assert_same(loaded, saved)
        engines.assert_same(final, expected, **CLOSE)


def pass_on():
    """From one optimizer to another by a full state dict that rank 0 holds, without a file."""
    model, optimizer = begin("fsdp", basis="both")
    advance(model, optimizer, 0, STOP)
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    heir = SophiaK(groups(model), basis="both")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(model, heir, state if engines.place()[0] == 0 else {}, options=options)
    return everything(model, heir), everything(model, optimizer)


def test_a_full_state_dict_from_rank_0(ranks):
    for found, expected in ranks.run(pass_on):
        engines.assert_same(found, expected)


def inherit(engine):
    """SophiaG's curvature, in shards, becomes one of the identity's basis."""
    model, old = begin(engine, kind=SophiaG, bias_correction=True)
    advance(model, old, 0, 2)
    optimizer = SophiaK([{"params": old.param_groups[0]["params"]}], others="curvature")
    optimizer.load_state_dict(old.state_dict())
    advance(model, optimizer, 2, 5)
    return everything(model, optimizer)


def test_the_curvature_of_sophia_g(ranks):
    expected = inherit("none")
    for found in ranks.run(inherit, "fsdp"):
        engines.assert_same(found, expected, **CLOSE)


def cut_twice():
    mesh = init_device_mesh("cpu", (2, 2))
    p = torch.nn.Parameter(distribute_tensor(torch.zeros(4, 4), mesh, (Shard(0), Shard(1))))
    with pytest.raises(ValueError, match=r"parameter 1 of shape \(4, 4\) is a DTensor with placements .*Shard"):
        SophiaK([torch.nn.Parameter(torch.zeros(3)), p])
    SophiaK([p], hidden=False)


def test_matrices_cut_along_two_dimensions_are_refused(ranks):
    ranks.run(cut_twice, world=4)


def cut_columns(engine):
    """The second matrix is the larger: it has the first owner."""
    options = {"shard_placement_fn": lambda p: Shard(p.ndim - 1)} if engine == "fsdp" else {}
    torch.manual_seed(0)
    layers = torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 8)
    model = engines.spread(engine, torch.nn.Sequential(*layers).double(), **options)
    optimizer = SophiaK(engines.parameters(model).values(), lr=0.02, curvature_interval=1, basis="both")
    source = torch.Generator().manual_seed(1)
    for _ in range(3):
        x = torch.randn(12, 4, generator=source, dtype=torch.float64)
        own = engines.own_rows(12)
        chunks = [[row for row in own if row // 4 == chunk] for chunk in range(3)]
        rows = [row for chunk in chunks for row in chunk]
        optimizer.refresh_curvature([lambda x=x[chunk]: model(x) for chunk in chunks], rows=rows)
        model(x[own]).pow(4).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return engines.snapshot(model)


def test_shards_of_columns(ranks):
    expected = cut_columns("none")
    for found in ranks.run(cut_columns, "fsdp"):
        engines.assert_same(found, expected, **CLOSE)
