"""TokenLayout: lengths, positions, labels and ids of the published layout, and their inverses."""

import pytest
import torch

from ivideogpt.config import TokenizerConfig
from ivideogpt.layout import IGNORE_INDEX, TokenLayout


def published(context_length: int) -> TokenLayout:
    return TokenizerConfig.preset("64", context_length=context_length).layout


def test_published_numbers():
    layout = published(2)
    assert (layout.context_slot_id, layout.dynamics_slot_id, layout.vocab_size) == (16384, 16385, 16386)
    assert layout.sequence_length(16) == 751
    assert published(1).sequence_length(16) == 511
    assert (published(1).prompt_length, layout.prompt_length) == (257, 514)
    assert layout.max_horizon(1024) == 30 and layout.sequence_length(32) <= 1024 < layout.sequence_length(33)


@pytest.mark.parametrize("context_length", [1, 2, 3])
def test_split_inverts_assemble_and_slots_stand_where_the_layout_says(context_length):
    layout = TokenLayout(context_length, 9, 4, 11, 7)
    context = torch.randint(0, 11, (2, context_length, 9))
    dynamics = torch.randint(0, 7, (2, 3, 4))
    tokens = layout.assemble(context, dynamics)
    assert tokens.shape[1] == layout.sequence_length(context_length + 3)
    assert layout.num_frames(tokens.shape[1]) == context_length + 3
    assert all(map(torch.equal, layout.split(tokens), (context, dynamics)))

    assert (tokens[:, layout.slot_positions(3)] == layout.dynamics_slot_id).all()
    assert (tokens == layout.dynamics_slot_id).sum() == 2 * 3
    assert (tokens == layout.context_slot_id).sum() == 2 * (context_length - 1)
    assert torch.equal(tokens[:, layout.reward_positions(3)], dynamics[..., -1] + 11)
    assert torch.equal(tokens[:, : layout.prompt_length], layout.prompt(context))


def test_labels_leave_out_context_and_first_slot_only():
    layout = TokenLayout(2, 9, 4, 11, 7)
    tokens = layout.assemble(torch.zeros(1, 2, 9, dtype=torch.long), torch.zeros(1, 2, 4, dtype=torch.long))
    labels = layout.labels(tokens)
    assert (labels[:, : layout.prompt_length] == IGNORE_INDEX).all()
    assert torch.equal(labels[:, layout.prompt_length :], tokens[:, layout.prompt_length :])
    assert labels[0, layout.slot_positions(2)[1]] == layout.dynamics_slot_id


def test_ids_outside_of_their_codebook_are_clamped():
    layout = TokenLayout(1, 4, 4, 11, 7)
    tokens = torch.full((1, layout.sequence_length(2)), layout.dynamics_slot_id)
    context, dynamics = layout.split(tokens)
    assert context.max() == 10 and dynamics.max() == 6
    assert layout.split(torch.zeros_like(tokens))[1].min() == 0


def test_actions_and_rewards_belong_to_the_frames_they_lead_to():
    layout = TokenLayout(2, 9, 4, 11, 7)
    actions = torch.arange(5.0).view(1, 5, 1)
    assert layout.slot_actions(actions, 3).flatten().tolist() == [1, 2, 3]  # the action at frame 4 leads nowhere
    assert layout.future_rewards(torch.arange(5.0).view(1, 5)).flatten().tolist() == [2, 3, 4]
    with pytest.raises(ValueError, match="need at least 5 actions.*got 4"):
        layout.slot_actions(actions[:, :4], 4)


def test_lengths_that_are_no_clip_are_refused():
    layout = published(2)
    with pytest.raises(ValueError, match="752 tokens is no whole clip"):
        layout.num_frames(752)
    with pytest.raises(ValueError, match="1 frames is shorter than the context of 2"):
        layout.sequence_length(1)
