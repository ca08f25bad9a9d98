"""Load questions whose answer is a summary: QMSum meetings and SQuALITY stories, scored with ROUGE-L.

One document a question, the whole meeting or story; rows keep their order.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from focus_core.errors import EmptyCorpusError
from focus_core.evaluation.files import read_rows
from focus_core.evaluation.suite_metrics import Measure
from focus_core.evaluation.trial import Trial
from focus_core.text.corpus import Document

_ROUGE = Measure("rouge-l")


def qmsum(path: Path) -> Iterator[Trial]:
    """Yield QMSum's queries, the general ones of a meeting before the specific ones.

    Raises:
        EmptyCorpusError: the file is of another kind.
    """
    for number, row in enumerate(read_rows(path)):
        if not isinstance(row.get("meeting_transcripts"), list):
            raise EmptyCorpusError(f"rows of {path} have no meeting_transcripts; give a QMSum file")
        lines = [f"{turn['speaker']}: {turn['content']}" for turn in row["meeting_transcripts"]]
        meeting = (Document(str(row.get("meeting_id", f"meeting-{number}")), "\n".join(lines)),)
        for kind in ("general", "specific"):
            for item in row.get(f"{kind}_query_list") or ():
                yield Trial(meeting, item["query"], (item["answer"],), None, False, kind, measure=_ROUGE)


def squality(path: Path) -> Iterator[Trial]:
    """Yield SQuALITY's questions; each of the written answers is accepted.

    Raises:
        EmptyCorpusError: the file is of another kind.
    """
    for number, row in enumerate(read_rows(path)):
        if not isinstance(row.get("questions"), list) or "document" not in row:
            raise EmptyCorpusError(f"rows of {path} have no document and questions; give a SQuALITY file")
        story = (Document(f"story-{number}", row["document"]),)
        for item in row["questions"]:
            answers = tuple(response["response_text"] for response in item["responses"])
            label = f"question {item.get('question_number', '')}".strip()
            yield Trial(story, item["question_text"], answers, None, False, label, measure=_ROUGE)
