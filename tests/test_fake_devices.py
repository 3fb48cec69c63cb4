"""Fake devices refuse what several GPUs refuse, and compute what the CPU computes."""

import numpy as np
import pytest
import torch
from fake_devices import fake_devices, put

FIRST, SECOND = "cuda:0", "cuda:1"


@pytest.mark.parametrize(
    "mixed",
    [
        lambda a, b, cpu: a + b,
        lambda a, b, cpu: a @ b,
        lambda a, b, cpu: a * cpu,
        lambda a, b, cpu: a.add_(b),
        lambda a, b, cpu: torch.cat([a, b]),
        lambda a, b, cpu: torch.stack([a[0], cpu[0]]),  # even of numbers
        lambda a, b, cpu: torch.einsum("i,i->", a, b),
        lambda a, b, cpu: torch.where(a > 0, a, b),
        lambda a, b, cpu: torch.where(cpu > 0, a, 0.0),
        lambda a, b, cpu: a.masked_fill(b > 0, 0.0),
        lambda a, b, cpu: a.gather(0, torch.zeros(1, dtype=torch.long)),
        lambda a, b, cpu: a.index_add(0, torch.tensor([1], device=SECOND), a[:1]),
        lambda a, b, cpu: a[torch.tensor([1], device=SECOND)],
        lambda a, b, cpu: cpu[torch.tensor([1], device=FIRST)],
        lambda a, b, cpu: cpu[a > 0],
        lambda a, b, cpu: a.__setitem__(torch.tensor([0, 1]), b[:2]),
        lambda a, b, cpu: cpu + a[0],  # a number, but not the CPU's
        lambda a, b, cpu: torch.nn.functional.linear(a, b[None]),
        lambda a, b, cpu: torch.nn.functional.layer_norm(a, (4,), b),
    ],
)
def test_what_mixes_devices_is_refused_as_torch_refuses_it(mixed):
    with fake_devices():
        a, b = torch.ones(4, device=FIRST), torch.ones(4, device=SECOND)
        with pytest.raises(RuntimeError, match="on the same device"):
            mixed(a, b, torch.ones(4))


def test_numpy_of_what_is_on_a_gpu_is_refused():
    with fake_devices():
        there = torch.ones(2, device=FIRST)
        for convert in (lambda: there.numpy(), lambda: np.asarray(there)):
            with pytest.raises(TypeError, match="to host memory first"):
                convert()
        assert there.cpu().numpy().tolist() == [1.0, 1.0]


def test_what_torch_allows_is_allowed_and_right():
    numbers = torch.arange(6.0)
    with fake_devices() as devices:
        there = numbers.to(SECOND)
        moved = len(devices.copies)
        computed = {
            "a number of the CPU": there * torch.tensor(2.0),
            "an index of the CPU": there[torch.tensor([3, 1])],
            "a mask of the CPU": there[numbers > 2],
            "like it": torch.zeros_like(there) + there.new_ones(6),
            "made there": torch.arange(6, device=there.device) + there,
            "sorted": there.sort(descending=True).values,
            "in several": torch.stack(there.split(2)).unbind()[1],
        }
        assert {str(each.device) for each in computed.values()} == {SECOND}
        assert len(devices.copies) == moved
        filled = there.clone()
        filled[:2] = torch.ones(2)  # a slice is filled by a copy
        filled[torch.tensor([4, 5])] = torch.tensor(0.5)
        assert filled.tolist() == [1.0, 1.0, 2.0, 3.0, 0.5, 0.5]
        found = {name: each.tolist() for name, each in computed.items()}
    assert found == {
        "a number of the CPU": [0.0, 2.0, 4.0, 6.0, 8.0, 10.0],
        "an index of the CPU": [3.0, 1.0],
        "a mask of the CPU": [3.0, 4.0, 5.0],
        "like it": [1.0] * 6,
        "made there": [0.0, 2.0, 4.0, 6.0, 8.0, 10.0],
        "sorted": [5.0, 4.0, 3.0, 2.0, 1.0, 0.0],
        "in several": [2.0, 3.0],
    }


def test_copies_are_copies_and_are_counted():
    with fake_devices() as devices:
        here = torch.zeros(3)
        there = here.to(FIRST)
        there += 1.0
        assert here.tolist() == [0.0] * 3
        assert there.to(FIRST) is there
        assert there.to("cuda") is there
        assert there.to(here).device == here.device
        back = torch.empty(3, device=SECOND).copy_(there)
        assert back.tolist() == [1.0] * 3
        ways = [(str(copy.source), str(copy.target), copy.bytes) for copy in devices.copies]
    assert ways == [("cpu", FIRST, 12), (FIRST, "cpu", 12), (FIRST, SECOND, 12)]


def test_gradients_cross_devices_and_land_where_their_tensor_is():
    with torch.random.fork_rng():
        first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)
    with fake_devices():
        put(first, FIRST)
        put(second, SECOND)
        loss = second(first(torch.ones(2, 3, device=FIRST)).to(SECOND)).sum()
        gradients = torch.autograd.grad(loss, [first.weight, second.weight])
        assert [str(each.device) for each in gradients] == [FIRST, SECOND]
        with pytest.raises(RuntimeError, match="on the same device"):
            second(first(torch.ones(2, 3, device=FIRST)))
    loss = second(first(torch.ones(2, 3))).sum()
    expected = torch.autograd.grad(loss, [first.weight, second.weight])
    assert all(map(torch.equal, gradients, expected))
