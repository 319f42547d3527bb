r"""Makes a long and a short answer from a row of GSM8K.

The column `answer` of a row has a solution with calculator annotations, then `####` and the result:

    Natalia sold 48/2 = <<48/2=24>>24 clips in May.
    #### 24

The long answer is the solution without annotations, with the result in a box on the last line. The short answer is the
box alone.
"""

import re

from thinkpo_jax.data.file_formats import Record, RecordError
from thinkpo_jax.data.messages import require_column, require_text

BOXED_INSTRUCTION = "Return your final response within \\boxed{}. "  # before the question, in training and evaluation
RESULT_MARK = "####"
ANSWER_COLUMNS = frozenset({"answer", "long", "short"})
_ANNOTATION = re.compile(r"<<.*?>>")


def split_solution(answer: str) -> tuple[str, str]:
    """Returns the solution without annotations, and the result without commas. Both are empty if there is no `####`."""
    solution, mark, result = answer.rpartition(RESULT_MARK)
    return _ANNOTATION.sub("", solution).strip(), result.strip().replace(",", "") if mark else ""


def add_answers(record: Record, location: str) -> Record:
    """Returns a row with the columns `long` and `short`, and with the instruction of the benchmark in `question`.

    Raises `RecordError` if a column is missing or the answer has no result.
    """
    question = require_text(require_column(record, "question", location), f"{location}, question")
    answer = require_text(require_column(record, "answer", location), f"{location}, answer")
    solution, result = split_solution(answer)
    if not result:
        problem = f"expected a solution, then `{RESULT_MARK}` and the result, found no result. Correct the row"
        raise RecordError("no result", f"{location}, answer: {problem}.")
    short = f"\\boxed{{{result}}}"
    answers = {"long": f"{solution}\n{short}".strip(), "short": short}
    return {**record, "question": BOXED_INSTRUCTION + question, **answers}
