"""What several processes of a run do together; all of them have to call these functions."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object


Result = TypeVar("Result")


def over_processes(function: Callable[[Any], Result], batches: Sequence[Any]) -> list[Result]:
    """Return `function` of each of `batches`, which the processes share among them, in order."""
    state = PartialState()
    mine = [function(batch) for batch in batches[state.process_index :: state.num_processes]]
    shares = gather_object([mine])
    return [shares[index % len(shares)][index // len(shares)] for index in range(len(batches))]


def of_first_process(function: Callable[[], Result]) -> Result:
    """Return what `function` returns in the first process, which alone calls it.

    Whether a file is there is asked so: the others might look for it only once the first has written it.
    """
    result = [function() if PartialState().is_main_process else None]
    broadcast_object_list(result)
    return result[0]
