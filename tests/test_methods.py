"""methods.md says what report.json says, cites what was used, and nothing else."""

import re

from made_up_evaluation import made_up_evaluation

from medblip.methods import methods_markdown
from medblip.references import COHORTS, REFERENCES, TOWERS


def cited(text: str) -> set[str]:
    return set(re.findall(r"@(\w+)[\];]", text.split("## References")[0]))


def test_every_citation_has_its_entry_and_every_entry_is_cited():
    text = methods_markdown(made_up_evaluation()[0])
    listed = re.findall(r"^@\w+\{(\w+),$", text.split("```bibtex")[1], re.M)
    assert len(listed) == len(set(listed)) and set(listed) == cited(text) and len(listed) > 10


def test_only_what_was_used_is_cited():
    report, _ = made_up_evaluation()
    used = cited(methods_markdown(report))
    assert {"hu2022lora", "cortes1995svm", "ellis2009aibl", "malone2013miriad", "luo2022biogpt"} <= used
    assert not used & {"petersen2010adni", "chung2024flan", "papineni2002bleu", "lin2004rouge"}
    report["trained_on"] |= {"lora": False, "towers": {"language": "tiny-lm"}}
    report["baselines"]["AIBL"].pop("voxel_svm")
    report["baselines"]["MIRIAD"].pop("voxel_svm")
    report["cohorts"] = {"HOME": report["cohorts"]["AIBL"]}
    less = cited(methods_markdown(report))
    assert used - less == {
        "hu2022lora", "cortes1995svm", "ellis2009aibl", "malone2013miriad", "luo2022biogpt", "li2023blip2"
    }  # fmt: skip


def test_numbers_are_the_reports():
    report, _ = made_up_evaluation()
    text = methods_markdown(report)
    for told in (
        "600 scans of 210 subjects, for 800 steps of 32 samples", "130 scans, 128 of them scored and 2 left out",
        "cube of 96 x 96 x 96 of 2.2 mm", "200 bootstrap draws", report["commit"], report["split_sha256"],
        "tier 'cognition'", "AIBL [@ellis2009aibl]: 60 scans of 30 subjects, CN, MCI, AD",
    ):  # fmt: skip
        assert told in text
    known = re.findall(r"\d+", repr(report))
    told = re.findall(r"(?<![\w@])\d+(?!\w)", text.split("## References")[0])
    assert set(told) - set(known) <= {"1"}, "a number that the report does not hold"


def test_what_is_not_in_the_report_is_unknown():
    report, _ = made_up_evaluation()
    for name in ("trained_on", "recipe", "rule", "counts", "commit", "split_sha256"):
        report[name] = None
    text = methods_markdown(report)
    assert "augment" not in text and "BLIP-2" not in text
    for told in (
        "trained on unknown scans of unknown subjects", "How the volumes were prepared is unknown",
        "How log-likelihoods were compared is unknown", "The commit of the code is unknown",
    ):  # fmt: skip
        assert told in text


def test_every_name_in_the_tables_has_an_entry():
    assert set(COHORTS.values()) | set(TOWERS.values()) <= set(REFERENCES)
    assert all(re.match(rf"@\w+\{{{key},\n.*title=", entry) for key, entry in REFERENCES.items())


def test_augmentation_is_told_in_words():
    report, _ = made_up_evaluation()
    assert "Volumes were augmented in training" in methods_markdown(report)
    report["trained_on"]["augment"] = False
    assert "Volumes were not augmented" in methods_markdown(report)
