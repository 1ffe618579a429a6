"""The final model of a run goes to the Hub; its checkpoints, optimizers and logs never do."""

import sys
from typing import TYPE_CHECKING

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from ...common.progress import Progress
from ...common.settings import SettingsError
from ..errors import RunEnded


if TYPE_CHECKING:
    from ...hub.destination import Destination

# The `hub_*` fields that are None unless set.
_OPTIONAL = ("hub_model_id", "hub_revision", "hub_private_repo", "hub_token")


def check_hub_settings(args: TrainingArguments) -> None:
    """Check the `hub_*` fields of `args`; asks the Hub nothing.

    Raises:
        SettingsError: if they name no repository, ask for more than the final model to go there, or for nothing.
    """
    if HubStrategy(args.hub_strategy) is not HubStrategy.END or args.hub_always_push:
        setting = (
            "hub_always_push=true" if args.hub_always_push else f"hub_strategy={HubStrategy(args.hub_strategy).value}"
        )
        raise SettingsError(
            f"{setting}: only the final model goes to the Hub, no checkpoint and no optimizer; leave it out."
        )
    if not args.push_to_hub:
        if without_effect := [name for name in _OPTIONAL if getattr(args, name) is not None]:
            raise SettingsError(
                f"{without_effect[0]} says how push_to_hub=true uploads the model; set both, or leave it out."
            )
        return
    if args.hub_model_id is None:
        raise SettingsError("push_to_hub=true, but not where to; set hub_model_id=org/name.")
    destination_of(args)


def destination_of(args: TrainingArguments) -> "Destination":
    """Return where the final model goes.

    Raises:
        SettingsError: if that is no repository.
    """
    from ...hub.destination import DEFAULT_BRANCH, Destination

    return Destination(
        args.hub_model_id,
        args.hub_revision or DEFAULT_BRANCH,
        # Without the setting too, where Transformers would publish.
        private=args.hub_private_repo is not False,
        token=args.hub_token,
    )


class PushingMixin:
    """Uploads the final model when asked, and not what the Trainer would upload besides, or meanwhile."""

    def init_hf_repo(self, *args, **kwargs) -> None:
        """Make no repository: a run that fails would leave an empty one."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload nothing while training runs."""

    def push_to_hub(self) -> None:
        """Upload the model in `output_dir`; see [`push_final_model`]."""
        push_final_model(self.args)


def push_final_model(args: TrainingArguments) -> None:
    """Upload the model in `output_dir`, if asked, from the first process, and print where it is.

    No process waits for another one: uploading may take longer than they would.

    Raises:
        PushError: if that fails; the message has the command that does it later.
        RunEnded: if it is interrupted.
    """
    if not args.push_to_hub or args.process_index != 0:
        return

    from ...hub.push import push_written

    destination = destination_of(args)
    try:
        pushed = push_written(args.output_dir, destination, _Stderr())
    except KeyboardInterrupt:
        command = destination.command(args.output_dir)
        raise RunEnded(
            130, f"interrupted; {args.output_dir} holds the final model, and `{command}` goes on to upload it."
        ) from None
    print(f"Pushed to {pushed.url}, commit {pushed.commit[:8]}.")


class _Stderr(Progress):
    def tell(self, message: str) -> None:
        print(f"train.py: {message}", file=sys.stderr)

    def warn(self, message: str) -> None:
        print(f"train.py: warning: {message}", file=sys.stderr)
