"""Each scan is encoded once and each prompt read once, and a batch or a neighbour changes no answer."""

import pytest
import torch
from tiny import GRID, tiny_model, tiny_words

from medblip.arms import BLANK, Ask
from medblip.asking import Interview, encode
from medblip.distributed import Control, Rank
from medblip.inference import Asker
from medblip.shards import Reader, ShardIndex
from medblip.share import Crew
from medblip.text import DIAGNOSIS_ANSWERS

CPU = torch.device("cpu")
ALONE = Rank(0, 1, 0, CPU)
CREW = Crew(ALONE, Control(ALONE))
ANSWERS = tuple(DIAGNOSIS_ANSWERS.values())
PROMPTS = ["Question: one? Answer:", "The age is 71 years. Question: one? Answer:", "Question: two? Answer:"]


@pytest.fixture(scope="module")
def asker():
    return Asker(tiny_model("tiny").eval(), tiny_words("tiny"), GRID, CPU)


def count_rows(module, counted: list[int], name: str) -> None:
    """Notes how many samples each call of a module has, by the argument that holds them."""
    module.register_forward_pre_hook(
        lambda _, args, given: counted.append(len(given[name] if name in given else args[0])), with_kwargs=True
    )


def test_scans_are_encoded_once_and_prompts_read_once(asker, made_up_shards):
    index = ShardIndex(made_up_shards)
    reader, samples = Reader(index, 1), index.samples("train")
    encoded, read = [], []
    count_rows(asker.model.vision, encoded, "volume_BXYZ")
    hook = asker.model.language.lm.register_forward_pre_hook(
        lambda _, __, given: read.append(len(given["inputs_embeds"])) if "inputs_embeds" in given else None,
        with_kwargs=True,
    )
    interview = encode(asker, reader, samples, "demographics", 4, CREW)
    reader.close()
    assert sum(encoded) == len(samples) == 6 and interview.queries_NQC.shape[0] == 6
    rows = list(range(6))
    asks = [Ask(prompt, row) for row in rows for prompt in interview.records(rows)[:2]] * 3
    asks += [Ask(PROMPTS[0], BLANK)] * 6 + [Ask(PROMPTS[0], None)] * 6
    scores = interview.score(asks, ANSWERS)
    assert sum(read) == len(scores) == len(set(asks)) == 14
    assert sum(encoded) == 7  # and the blank volume
    hook.remove()


def test_a_batch_changes_no_score_and_options_are_scored_as_by_the_loss(asker):
    queries_NQC = torch.randn(4, *asker.blank_QC.shape, generator=torch.Generator().manual_seed(0))
    asks = [Ask(prompt, image) for prompt in PROMPTS for image in (0, 1, 2, 3, BLANK, None)]
    found = {size: Interview(asker, [], queries_NQC, "none", size, CREW).score(asks, ANSWERS) for size in (1, 5, 32)}
    for ask in asks:
        for size in (5, 32):
            torch.testing.assert_close(
                torch.tensor(found[size][ask].logp), torch.tensor(found[1][ask].logp), atol=1e-4, rtol=1e-5
            )
    prompt_ids, is_prompt = asker.words.prompts([PROMPTS[1]])
    for number, answer in enumerate(ANSWERS):
        answer_ids, is_answer = asker.words.answers([answer])
        for image in (2, None):
            use_queries = torch.tensor([image is not None])
            logp_BA = asker.model.language(queries_NQC[2:3], use_queries, prompt_ids, is_prompt, answer_ids, is_answer)
            expected = found[1][Ask(PROMPTS[1], image)].logp[number]
            assert logp_BA.sum().item() == pytest.approx(expected, abs=1e-4)
