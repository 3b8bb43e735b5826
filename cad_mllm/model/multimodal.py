"""The multimodal language model: projected features take the place of placeholder tokens.

Shapes: B rows of T tokens, D hidden channels of the LM, S positions whose logits are needed; N images and M
clouds of K tokens each, with the D of their encoder. Where an encoder trains, it is part of its projector,
which then takes images (N, 3, S, S) and clouds (M, P, 6) in place of features.
"""

from collections.abc import Set
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cad_mllm.model.loss import LinearCrossEntropy
from cad_mllm.model.names import stored_name

ProjectorName = Literal["image_projector", "point_projector"]
GroupName = Literal["lm", "point_projector", "image_projector"]
GROUP_NAMES: tuple[GroupName, ...] = ("lm", "point_projector", "image_projector")


class MultimodalLM(nn.Module):
    """A causal LM and the two projectors: everything that an engine trains or shards, and nothing else.

    `lm` is a Hugging Face causal LM, possibly wrapped by `peft`.
    """

    # Declared for the type checker, to which a submodule could be anything.
    lm: Any
    point_projector: nn.Module
    image_projector: nn.Module

    def __init__(self, lm: nn.Module, point_projector: nn.Module, image_projector: nn.Module) -> None:
        super().__init__()
        self.lm = lm
        self.point_projector = point_projector
        self.image_projector = image_projector
        # Behind `lm`: the head's weight, which both hold, goes by the name that it has there.
        self.loss = LinearCrossEntropy(_bare(lm).get_output_embeddings())

    def forward(
        self,
        tokens_BT: Tensor,
        attention_mask_BT: Tensor,
        labels_BT: Tensor,
        loss_rows: Tensor,
        image_features_NKD: Tensor,
        image_rows: Tensor,
        point_features_MKD: Tensor,
        point_rows: Tensor,
        trainable: Set[ProjectorName],
        packed: tuple[Tensor, Tensor, int] | None = None,
    ) -> Tensor:
        """Sum the cross-entropy over the supervised tokens: an fp32 scalar.

        Args:
            tokens_BT: int64; any valid id at modality placeholders and at padding.
            attention_mask_BT: 1 at tokens and placeholders, 0 at padding.
            labels_BT: int64, unshifted; IGNORED_LABEL where a token is not supervised.
            loss_rows: int64 (S,), S >= 1: the positions whose next label counts, as flat indices into B * T.
            image_features_NKD: what the image projector takes; N may be 0.
            image_rows: int64 (N * K,): where the image tokens stand, as flat indices into B * T.
            point_features_MKD: what the point projector takes; M may be 0.
            point_rows: int64 (M * K,), likewise.
            trainable: the projectors that train in this stage; the others run without gradient.
            packed: where samples share one row: their position ids (1, T), their borders (int32, from 0 to
                T) and the length of the longest. The LM must have been built for it.
        """
        embeds_BTD = self.embed(
            tokens_BT, image_features_NKD, image_rows, point_features_MKD, point_rows, trainable
        )
        inputs: dict[str, Any] = {"attention_mask": attention_mask_BT}
        if packed is not None:
            position_ids_1T, borders, longest = packed
            inputs = {
                "attention_mask": None,
                "position_ids": position_ids_1T,
                "cu_seq_lens_q": borders,
                "cu_seq_lens_k": borders,
                "max_length_q": longest,
                "max_length_k": longest,
            }
        # The decoder alone: of most positions no logits are needed.
        hidden_BTD = _bare(self.lm).base_model(inputs_embeds=embeds_BTD, use_cache=False, **inputs)[0]
        hidden_SD = hidden_BTD.flatten(0, 1).index_select(0, loss_rows)
        loss: Tensor = self.loss(hidden_SD, labels_BT.flatten().index_select(0, loss_rows + 1))
        return loss

    def embed(
        self,
        tokens_BT: Tensor,
        image_features_NKD: Tensor,
        image_rows: Tensor,
        point_features_MKD: Tensor,
        point_rows: Tensor,
        trainable: Set[ProjectorName] = frozenset(),
    ) -> Tensor:
        """Give the input embeddings (B, T, D).

        The modules run in one fixed order whatever the batch holds, forward and backward, so that ranks
        with different modalities stay in step under ZeRO-3: a modality without samples sends a dummy
        through its projector, and zero times the result is added to the first embedding.
        """
        embeds_BTD: Tensor = self.lm.get_input_embeddings()(tokens_BT)
        if torch.is_grad_enabled() and not embeds_BTD.requires_grad:
            # Frozen embeddings (LoRA). Without a gradient here the backward pass of the first decoder layer
            # would skip modules on the ranks whose batch has text alone, and their all-gathers would no
            # longer match those of the others: a hang. ZeRO-3 also releases a layer whose input needs no
            # gradient before the gradients of its weights are there.
            embeds_BTD.requires_grad_()
        embeds_RD = embeds_BTD.flatten(0, 1)
        inputs: tuple[tuple[ProjectorName, Tensor, Tensor], ...] = (
            ("point_projector", point_features_MKD, point_rows),
            ("image_projector", image_features_NKD, image_rows),
        )
        for name, features, rows in inputs:
            projector = self.get_submodule(name)
            present = features.shape[0] > 0
            if not present:
                features = _dummy(features)
            with torch.set_grad_enabled(torch.is_grad_enabled() and name in trainable):
                projected_RD = projector(features).flatten(0, 1).to(embeds_RD.dtype)
            if present:
                embeds_RD = embeds_RD.index_copy(0, rows, projected_RD)
            else:
                embeds_RD = embeds_RD.index_add(0, rows.new_zeros(1), 0.0 * projected_RD[:1])
        return embeds_RD.view_as(embeds_BTD)


def _dummy(none: Tensor) -> Tensor:
    """One input of a kind of which there is none: an image, or the shortest sequence (a token, a point)."""
    shape = none.shape[1:] if none.dim() == 4 else (1, none.shape[-1])
    return none.new_zeros((1, *shape))


def _bare(lm: Any) -> Any:
    """The causal LM inside of what `peft` wraps around it (its adapters are inside of the LM's layers)."""
    return lm.get_base_model() if hasattr(lm, "get_base_model") else lm


def parameter_groups(model: MultimodalLM) -> dict[GroupName, list[tuple[str, nn.Parameter]]]:
    """Sort the trainable parameters by the module that owns them, in module order.

    Their names are the full ones that they have in files (`names.py`).
    """
    groups: dict[GroupName, list[tuple[str, nn.Parameter]]] = {name: [] for name in GROUP_NAMES}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            owner = name.partition(".")[0]
            groups[next(group for group in GROUP_NAMES if group == owner)].append(
                (stored_name(name), parameter)
            )
    return groups
