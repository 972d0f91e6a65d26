"""One scan, one question, one answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from medblip.text import DIAGNOSIS_ANSWERS, is_diagnosis_question, render_prompt, render_record

if TYPE_CHECKING:  # importing torch takes seconds, and `--help` must not wait for it
    from medblip.inference import Assistant

DISCLAIMER = "Research use only; not a medical device."


@dataclass(frozen=True, kw_only=True)
class AskOptions:
    """Ask a trained model about one scan.

    Examples:
      medblip ask scan.nii.gz "What will this subject be diagnosed with?" --model runs/x
      medblip ask scan.nii.gz "What is the diagnosis?" --model runs/x --report "The age is 74 years." --json
    """

    volume: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="VOLUME")]
    """The scan: NIfTI (.nii, .nii.gz), an Analyze or NIfTI pair (.hdr), or the folder of one DICOM series."""
    question: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="QUESTION")]
    """In words. A question for the diagnosis is answered with probabilities, any other one in free words."""
    model: str
    """A run folder, or one of its checkpoints."""
    mask: str | None = None
    """Image on the scan's grid, above 0 in the brain; for a model that was trained on masked scans."""
    report: str = ""
    """Text of the health record. Sentences beyond the tier that the model was trained with are left out."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object, {"answer": ..., "probabilities": {...} or null}, and nothing else."""


def ask(options: AskOptions) -> int:
    """Answers and prints; returns the exit code.

    Raises:
        ValueError: if the file is not one readable brain volume, or the model cannot be loaded.
    """
    from medblip.distributed import log
    from medblip.inference import Assistant

    assistant = Assistant(options.model)
    record = render_record({}, options.report, assistant.ehr)
    if options.report and not record:
        log.warning("the record was not used: nothing of it is within the model's tier '%s'", assistant.ehr)
    found = answer_about(assistant, options.volume, options.question, record, options.mask)
    if options.json:
        print(json.dumps(found))
        return 0
    print(f"Question: {options.question}")
    print(f"Answer:   {found['answer']}")
    if found["probabilities"]:
        print("          " + ", ".join(f"{name} {p:.1%}" for name, p in found["probabilities"].items()))
    print(DISCLAIMER)
    return 0


def answer_about(
    assistant: Assistant, volume: str, question: str, record: str, mask: str | None = None
) -> dict[str, Any]:
    """The `answer` to a question about an image or a DICOM folder, and `probabilities` by diagnosis if it asks for one.

    The scan is prepared with the model's own recipe, by the function that prepared the training's scans.
    """
    from medblip.volume import prepare

    queries_BQC = assistant.encode(assistant.volume(prepare(volume, assistant.recipe, mask)))
    if not is_diagnosis_question(question):
        return {"answer": assistant.answer(queries_BQC, [render_prompt(record, question)])[0], "probabilities": None}
    p_BK = assistant.diagnose(queries_BQC, [record], question=question).double()
    probabilities = dict(zip(DIAGNOSIS_ANSWERS, p_BK[0].tolist(), strict=True))
    return {"answer": DIAGNOSIS_ANSWERS[max(probabilities, key=probabilities.get)], "probabilities": probabilities}
