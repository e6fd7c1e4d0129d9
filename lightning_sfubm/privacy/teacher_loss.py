"""The semantic teacher's training loss as a sum over users, for per-user gradients."""

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sfubm.errors import PrivacyError
from lightning_sfubm.modules.losses.cross_entropy import full_cross_entropy
from lightning_sfubm.modules.losses.precision import Precision
from lightning_sfubm.modules.semantic import SemanticTeacher


class TeacherLoss(nn.Module):
    """A user's loss is the mean cross-entropy of the next item over their positions [choice: every user counts the same,
    however long their history; the ordinary loss is the mean over the positions of all users].

    The teacher is reached on two ways: the encoder's parameters directly, those of adaptor and fusion only through the item
    table z (N + 1, H), which stands at the encoder's input *and* in the logits.

    Args:
        teacher: of a client; its parameters are trained.
        precision: number format of the logits where users are taken one by one, see
            :func:`~lightning_sfubm.modules.losses.precision.matmul_dtype`.

    Raises:
        PrivacyError: a layer mixes the rows of a batch, so that no gradient belongs to one user.
    """

    def __init__(self, teacher: SemanticTeacher, precision: Precision = "auto") -> None:
        super().__init__()
        for name, module in teacher.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise PrivacyError(
                    f"the teacher's layer '{name}' ({type(module).__name__}) mixes the users of a batch: use another norm"
                )
        self.teacher = teacher
        self.precision: Precision = precision

    @property
    def vectorizable(self) -> bool:
        """Whether ``torch.func.vmap`` knows the encoder's operations; recurrent layers have no such rule."""
        return not any(isinstance(module, nn.RNNBase) for module in self.teacher.modules())

    def table(self) -> Tensor:
        """The table z (N + 1, H) with its graph, once a step for all users: its random draws do not depend on them."""
        return self.teacher.table()

    def direct_parameters(self) -> dict[str, nn.Parameter]:
        """Trained parameters used beside the table, by name."""
        return {n: p for n, p in self.named_parameters() if p.requires_grad and n.startswith("teacher.encoder.")}

    def table_parameters(self) -> dict[str, nn.Parameter]:
        """Trained parameters that only the table depends on, by name."""
        return {n: p for n, p in self.named_parameters() if p.requires_grad and not n.startswith("teacher.encoder.")}

    def alone(self, table: Tensor, history: Tensor, targets: Tensor) -> Tensor:
        """Loss of one user, computed as the module's training step does.

        Args:
            table: (N + 1, H).
            history: (1, L) left-padded.
            targets: (1, L), 0 where nothing is to be predicted.

        Returns:
            Scalar.
        """
        predicting = targets != 0
        states, items = self.teacher.scaled(self.teacher.states(history, table)[predicting], table)
        return full_cross_entropy(states, items, targets[predicting], self.precision)

    def forward(self, table: Tensor, history: Tensor, targets: Tensor) -> Tensor:
        """The same loss in float32 without shapes that depend on the data, to be vectorised over users.

        Args:
            table: (N + 1, H).
            history: (L,) left-padded.
            targets: (L,), 0 where nothing is to be predicted.

        Returns:
            Scalar.
        """
        states, items = self.teacher.scaled(self.teacher.states(history.unsqueeze(0), table).squeeze(0), table)
        predicting = targets != 0
        losses = F.cross_entropy(states @ items[1:].T, (targets - 1).clamp_min(0), reduction="none")
        return (losses * predicting).sum() / predicting.sum().clamp_min(1)
