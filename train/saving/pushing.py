"""The final model of a run goes to the Hub; its checkpoints, optimizers and logs never do."""

import sys
from typing import TYPE_CHECKING

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from ...common.progress import Progress
from ...common.settings import SettingsError
from ..errors import RunEnded


if TYPE_CHECKING:
    from ...hub.push import Destination, PushResult


def check_hub_settings(args: TrainingArguments) -> None:
    """Check the `hub_*` fields of `args`; asks the Hub nothing.

    Raises:
        SettingsError: if they name no repository, or ask for more than the final model to go there.
    """
    if not args.push_to_hub:
        return
    if args.hub_model_id is None:
        raise SettingsError("push_to_hub=true, but not where to; set hub_model_id=org/name.")
    if HubStrategy(args.hub_strategy) is not HubStrategy.END or args.hub_always_push:
        setting = (
            "hub_always_push=true" if args.hub_always_push else f"hub_strategy={HubStrategy(args.hub_strategy).value}"
        )
        raise SettingsError(
            f"{setting}: only the final model goes to the Hub, no checkpoint and no optimizer; leave it out."
        )
    destination_of(args)


def destination_of(args: TrainingArguments) -> "Destination":
    """Return where the final model goes.

    Raises:
        SettingsError: if that is no repository.
    """
    from ...hub.push import DEFAULT_BRANCH, Destination

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

    def push_to_hub(self) -> "PushResult | None":
        """Upload the model in `output_dir` from the first process, and say where it is; None in the others.

        No process waits for another one: uploading may take longer than they would.

        Raises:
            PushError: if that fails; the message has the command that does it later.
            RunEnded: if it is interrupted.
        """
        if self.args.process_index != 0:
            return None

        from ...hub.push import push_written

        destination = destination_of(self.args)
        try:
            return push_written(self.args.output_dir, destination, _Warnings())
        except KeyboardInterrupt:
            command = destination.command(self.args.output_dir)
            raise RunEnded(
                130,
                f"interrupted; {self.args.output_dir} holds the final model, and `{command}` goes on to upload it.",
            ) from None


class _Warnings(Progress):
    def warn(self, message: str) -> None:
        print(f"train.py: warning: {message}", file=sys.stderr)
