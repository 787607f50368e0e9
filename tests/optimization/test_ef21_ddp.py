"""EF21 between two real processes, which are killed and start again, against the same training in one process."""

import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn

from polylib.optimization import BlockTopK, EF21State, NaturalRounding, TopK, ef21_hook

dist = torch.distributed
GLOO = dist.is_gloo_available() and hasattr(os, "fork")
pytestmark = pytest.mark.skipif(not GLOO, reason="needs gloo and processes that fork")
STEPS, SAVED, KILLED = 30, 12, 15
# Compressor, weights of the ranks, steps with whole gradients, megabytes of a bucket.
SETTINGS = {
    "top": (TopK(0.1), (None, None), 0, 25.0),
    "blocks": (BlockTopK(3, 20), (0.25, 0.75), 2, 1e-4),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 1)).double()


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.5)


def loss_of(net: nn.Module, rank: int, step: int) -> torch.Tensor:
    """Of a new batch in each step. The data of rank 1 are three times as large."""
    x = torch.randn(8, 10, generator=torch.Generator().manual_seed(100 * step + rank)).double() * (1 + 2 * rank)
    return (net(x)[:, 0] - torch.sin(x[:, 0])).square().mean()


def train(setting: str, rank: int, folder: Path, kill: bool) -> None:
    """One life of a rank: from the start or from its checkpoint to the end, or to its death."""
    compressor, weights, warmup, megabytes = SETTINGS[setting]
    net = network()
    optimizer = optimizer_of(net)
    ddp = nn.parallel.DistributedDataParallel(net, bucket_cap_mb=megabytes)
    state = EF21State(ddp, compressor, weight=weights[rank], warmup_steps=warmup)
    ddp.register_comm_hook(state, ef21_hook)
    checkpoint, first = folder / f"{setting}-{rank}.pt", 0
    if checkpoint.exists():
        kept = torch.load(checkpoint)
        net.load_state_dict(kept["net"])
        optimizer.load_state_dict(kept["optimizer"])
        state.load_state_dict(kept["feedback"])
        first = SAVED
    for step in range(first, STEPS):
        if step == SAVED and first == 0:
            kept = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "feedback": state.state_dict()}
            torch.save(kept, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
        if step == KILLED and kill:
            dist.barrier()  # so that both have written, and none waits for the other's gradients
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        loss_of(ddp, rank, step).backward()
        optimizer.step()
    found = {"net": net.state_dict(), "feedback": state.state_dict(), "first": first}
    torch.save(found, folder / f"{setting}-{rank}-end.pt")


def live(rank: int, folder: Path, life: int) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / f'store-{life}'}"
    dist.init_process_group("gloo", store, timedelta(seconds=60), world_size=2, rank=rank)
    if life == 1:
        with pytest.raises(ValueError, match="weight must be given by all ranks"):
            EF21State(network(), TopK(0.1), weight=0.3 if rank else None)
        with pytest.raises(ValueError, match="weight must be given by all ranks"):
            EF21State(network(), TopK(0.1), weight=0.3)
        train("blocks", rank, folder, kill=False)
    train("top", rank, folder, kill=life == 0)
    dist.destroy_process_group()


def two_lives(folder: Path) -> None:
    """Starts both ranks, waits for their death, and starts them again."""
    for life in range(2):
        children = []
        for rank in range(2):
            child = os.fork()  # of a process that has not trained yet: the start costs no import
            if child == 0:
                try:
                    live(rank, folder, life)
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                    os._exit(1)
                os._exit(0)
            children.append(child)
        ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(ends)


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """What both ranks had at the end, by setting."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-W", "ignore", __file__, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    codes = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{-signal.SIGKILL}" in codes[0], done.stderr[-3000:]
    assert codes[1] == "[0, 0]", done.stderr[-3000:]
    return {name: [torch.load(folder / f"{name}-{rank}-end.pt") for rank in range(2)] for name in SETTINGS}


def simulated(setting: str) -> tuple[nn.Module, dict[str, torch.Tensor], int]:
    """The same training in one process: the network, the server's estimates, and the entries sent by a rank."""
    compressor, weights, warmup, _ = SETTINGS[setting]
    share = [0.5 if weight is None else weight for weight in weights]
    net = network()
    speed, sent = {name: 0.0 for name, _ in net.named_parameters()}, 0
    own = {name: [torch.zeros_like(p).flatten() for _ in range(2)] for name, p in net.named_parameters()}
    for step in range(STEPS):
        each = []
        for rank in range(2):
            net.zero_grad()
            loss_of(net, rank, step).backward()
            each.append({name: p.grad.flatten().clone() for name, p in net.named_parameters()})
        for name, parameter in net.named_parameters():
            for rank in range(2):
                wanted = each[rank][name] / (2 * share[rank])
                change = wanted - own[name][rank]
                own[name][rank] = wanted if step < warmup else own[name][rank] + compressor(change)
            server = share[0] * own[name][0] + share[1] * own[name][1]
            sent += parameter.numel() if step < warmup else compressor.kept(parameter.numel())
            speed[name] = 0.5 * speed[name] + server.view_as(parameter)
            parameter.data -= 0.05 * speed[name]
    return net, {name: share[0] * one + share[1] * two for name, (one, two) in own.items()}, sent


@pytest.mark.parametrize("setting", SETTINGS)
def test_two_processes_train_as_one(ends, setting):
    net, server, _ = simulated(setting)
    for end in ends[setting]:
        torch.testing.assert_close(end["net"], net.state_dict(), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(end["feedback"]["server"], server, rtol=1e-7, atol=1e-10)
    one, two = (end["feedback"] for end in ends[setting])
    assert all(torch.equal(one["server"][name], two["server"][name]) for name in server)
    assert any((one["own"][name] - two["own"][name]).abs().max() > 1e-3 for name in server)


def test_the_killed_run_went_on_from_its_checkpoint(ends):
    assert [end["first"] for end in ends["top"]] == [SAVED] * 2
    assert [end["first"] for end in ends["blocks"]] == [0] * 2


def test_what_is_sent_is_counted(ends):
    size = sum(parameter.numel() for parameter in network().parameters())
    for setting, (_, _, warmup, _) in SETTINGS.items():
        _, _, entries = simulated(setting)
        for end in ends[setting]:
            kept = end["feedback"]
            whole = warmup * size
            assert kept["step"] == STEPS
            assert kept["bytes_dense"] == STEPS * size * 8
            assert kept["bytes_sent"] == whole * 8 + (entries - whole) * (8 + 4)  # float64 values, int32 indices


@pytest.fixture
def alone():
    """A group of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), world_size=1, rank=0)
    yield
    dist.destroy_process_group()


def test_bad_state(alone):
    net = network()
    with pytest.raises(TypeError, match="compressor must be"):
        EF21State(net, NaturalRounding())
    with pytest.raises(ValueError, match="warmup_steps must be"):
        EF21State(net, TopK(0.1), warmup_steps=-1)
    with pytest.raises(ValueError, match="weight must be"):
        EF21State(net, TopK(0.1), weight=0.0)
    state = EF21State(net, TopK(0.1))
    kept = state.state_dict()
    with pytest.raises(ValueError, match="ranks must be 1"):
        state.load_state_dict(kept | {"ranks": 2})
    state.load_state_dict(kept)
    whole = {name: torch.zeros(parameter.numel()) for name, parameter in net.named_parameters()}
    for wrong in ({"other.weight": torch.zeros(3)}, whole | {"0.bias": torch.zeros(3)}, {"0.bias": whole["0.bias"]}):
        with pytest.raises(ValueError, match="own must hold"):
            state.load_state_dict(kept | {"own": wrong})


if __name__ == "__main__":
    import torch._dynamo  # DistributedDataParallel imports it: here once, and not in each of four processes

    two_lives(Path(sys.argv[1]))
