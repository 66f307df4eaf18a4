"""What is read of a recording, and how often it is gone through: of many prompts, no more than is needed."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch

from ditq.calibration.batches import sampled_batches
from ditq.calibration.record import RecordedCall
from ditq.calibration.sampler import LATENTS, read_path

STEPS, BRANCHES = 3, 2


class Recorded:
    """Calls of one sample each; counts what is asked."""

    dtype = torch.float32
    steps = STEPS

    def __init__(self, prompts: int) -> None:
        self.conditions = list(range(prompts))
        self.read: list[int] = []
        self.gone_through = 0

    def places_of_calls(self) -> list[tuple[int, int]]:
        self.gone_through += 1
        return [(prompt, step) for prompt in self.conditions for step in range(STEPS) for _ in range(BRANCHES)]

    def steps_of_calls(self) -> list[int]:
        return [step for _, step in self.places_of_calls()]

    def calls(self, stride: int = 1, chosen: Collection[int] | None = None) -> Iterator[RecordedCall]:
        for number, (prompt, step) in enumerate(self.places_of_calls()):
            if chosen is None or number in chosen:
                self.read.append(number)
                yield RecordedCall({LATENTS: torch.full((1, 2), float(number))}, 0.0, step, prompt)


def test_a_path_reads_the_calls_of_its_conditions_only() -> None:
    recorded = Recorded(20)
    path = read_path(recorded, [3, 5])  # type: ignore[arg-type]
    assert path is not None and path.branches == BRANCHES
    first = [prompt * STEPS * BRANCHES for prompt in (3, 5)]
    for step in range(STEPS):
        numbers = [start + step * BRANCHES + branch for start in first for branch in range(BRANCHES)]
        assert path.calls[step][LATENTS][:, 0].tolist() == numbers
    assert sorted(recorded.read) == [start + number for start in first for number in range(STEPS * BRANCHES)]


def test_a_sample_of_calls_does_not_go_through_the_recording_for_each_of_them() -> None:
    gone_through = []
    for prompts in (4, 40):
        recorded = Recorded(prompts)
        sampled_batches(recorded, samples=8, batch=4)  # type: ignore[arg-type]
        gone_through.append(recorded.gone_through)
    assert gone_through[0] == gone_through[1]
