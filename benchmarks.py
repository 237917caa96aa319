"""The papers' benchmarks: their files, prompts, metrics and published scores. evaluate.py asks the questions.

Files, prompts, tiles and metrics are those of open-compass/VLMEvalKit 676301a [K], the day before the first
paper. Comments say where later commits and the scripts of OpenGVLab/InternVL [I], from which some of the
papers' numbers may come, differ. [K] stores pictures as JPEG before it asks about them, and answers in a
spreadsheet, which makes nan of an empty one; neither is done here [ours].
A row is a line of a TSV file: {column: text}, missing fields left out.
In this order: the texts of a row, the metrics of a row, what they add up to, the table of benchmarks; prompt,
score and aggregate; the file.
"""
import ast
import base64
import csv
import io
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from string import ascii_uppercase
from typing import NamedTuple

from common import InputError

# ---------------------------------------------------------------- the texts of a row

# pandas, with which [K] reads its files, takes a field with one of these texts as a missing one.
MISSING = {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>",
           "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}


def as_list(text: str) -> list[str]:
    """"['a', 'b']" -> ["a", "b"]; any text that is no list in Python's notation is the one element."""
    try:
        value = ast.literal_eval(text.strip()) if text.lstrip().startswith("[") else text
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text
    return [str(element) for element in value] if isinstance(value, list) else [text]


def options(row: dict) -> dict[str, str]:
    """{letter: text} of the options that a row has."""
    return {letter: str(row[letter]) for letter in ascii_uppercase if row.get(letter) is not None}


def answers(row: dict) -> list[str]:
    return as_list(str(row["answer"])) or [""]


# ---------------------------------------------------------------- the metrics of a row
# Each takes a row and what the model said, and returns 0 to 1, or None where [K] would ask a GPT.

DIGITS = dict(zip("none zero one two three four five six seven eight nine ten".split(),
                  "0 0 1 2 3 4 5 6 7 8 9 10".split(), strict=True))
# The words that get their apostrophes back: {what follows the stem: stems}, and a slip of the VQA script.
STEMS = {"n't": "ai are ca could did does do had has have is might must need ought sha should was were wo "
                "would",
         "'ve": "could might must should would not they we what where who you",
         "'ll": "how it somebody someone something they what who why you",
         "'s": "he how somebody someone that there what when where who why",
         "'re": "there they what why you",
         "'d": "he how it someone something there they where who you",
         "n't've": "could had might should would",
         "'d've": "he it she somebody someone something there they we who you",
         "": "ma'am o'clock 'twas y'all y'all'll y'all'd've 'ow's'at"}
APOSTROPHES = {word[:i] + word[i + 1:]: word
               for end, stems in STEMS.items() for word in [stem + end for stem in stems.split()]
               for i, character in enumerate(word) if character == "'"} | {"somebody'd": "somebodyd"}


def without_punctuation(text: str) -> str:
    """The VQA script's: marks become blanks, or nothing beside a blank or if the text has a 1,000. Full stops
    vanish, but not before a digit [K since 2025-05: nor after one]."""
    thousands, result = re.search(r"\d,\d", text), text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        joins = thousands or mark + " " in text or " " + mark in text
        result = result.replace(mark, "" if joins else " ")
    return re.sub(r"\.(?!\d)", "", result, count=32)


def normalize(text: str) -> str:
    """The VQA script's: lower case, digits for numbers, no articles, apostrophes where they belong."""
    words = without_punctuation(re.sub(r"[\n\t]", " ", text).strip()).lower().split()
    words = [DIGITS.get(word, word) for word in words]
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa(row: dict, said: str) -> float:
    """Ten people answered. Leaving out each in turn, an answer that three of the others gave is right."""
    said, given = normalize(said), [normalize(answer) for answer in answers(row)]
    return sum(min(1, (given.count(said) - (answer == said)) / 3) for answer in given) / len(given)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's."""
    distances = list(range(len(b) + 1))            # [j]: between what was read of a, and b[:j]
    for i, x in enumerate(a):
        row = [i + 1]
        for j, y in enumerate(b):
            row.append(min(distances[j] + (x != y), distances[j + 1] + 1, row[j] + 1))
        distances = row
    return distances[-1]


def anls(row: dict, said: str) -> float:
    """Average normalized Levenshtein similarity. [K] divides by the length of the upper-cased raw texts."""
    def difference(answer):
        a, b = (" ".join(text.lower().split()) for text in (answer, said))
        return edit_distance(a, b) / max(1, len(answer.upper()), len(said.upper()))

    similarity = 1 - min(map(difference, answers(row)))
    return similarity if similarity >= 0.5 else 0.0


def relaxed(row: dict, said: str) -> float:
    """Numbers may differ by 5 %: of what the model said, because [K], until 2025-09, and [I] swap the two."""
    def number(text):
        try:
            return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
        except ValueError:
            return None

    def right(answer):
        x, y = number(said.strip()), number(answer)
        if x and y is not None:
            return abs(x - y) / abs(x) <= 0.05
        return said.strip().lower() == answer.lower()

    return float(any(map(right, answers(row))))


def exact(row: dict, said: str) -> float:
    """[I] also drops a full stop at the end of what was said."""
    return float(said.strip().lower() in [answer.strip().lower() for answer in answers(row)])


def yes_no_judged(row: dict, said: str) -> float | None:
    found = {"yes", "no"} & set(without_punctuation(said.lower()).split())
    return float(found == {row["answer"].lower()}) if len(found) == 1 else None


def yes_no(row: dict, said: str) -> float:
    """Neither or both is wrong. [I] looks for yes, then for no, in the first four characters."""
    return yes_no_judged(row, said) or 0.0


def letter(said: str, choices: dict[str, str]) -> str | None:
    """The option that was chosen, Z for a refusal, None for neither [K: can_infer; stricter since 2025-08].
    [I] takes the first character, or the first option whose text occurs."""
    if "Failed to obtain answer via API" not in said:
        if any(refusal in said for refusal in (
                "Sorry, I can't help with images of people yet.", "I can't process this file.",
                "I'm sorry, but without the image provided", "Cannot determine the answer")):
            return "Z"
        words = set(re.sub(r"[.()\[\],:;!*#{}]", " ", said).split())
        found = words & choices.keys()
        if len(found) == 1 or not found and "Z" in words:
            return found.pop() if found else "Z"
    named = [key for key, text in choices.items() if text.lower() in said.lower()]
    return named[0] if len(named) == 1 else None


def choice(row: dict, said: str) -> float | None:
    chosen = letter(said, options(row))
    return None if chosen is None else float(chosen == row["answer"])


def mmmu(row: dict, said: str) -> float | None:
    """A question without options becomes a choice between its answer and others. [I] uses the parser of
    MMMU's authors, which gives 2 to 3 points less."""
    right = row["answer"] if row["answer"] in list(ascii_uppercase) else "A"
    invented = {} if "A" in options(row) else {"A": row["answer"], "B": "Other Answers"}
    return choice({**row, **invented, "answer": right}, said)


def contains(row: dict, said: str) -> float:
    def clean(text):
        text = text.strip().replace("\n", " ")
        formula = row.get("category") == "Handwritten Mathematical Expression Recognition"
        return text.replace(" ", "") if formula else text.lower()

    return float(any(clean(answer) in clean(said) for answer in answers(row)))


def mathvista(row: dict, said: str) -> float | None:
    """row["res"], if it is there, is what a judge or a rule took out of the answer. [K]'s slips: lists and
    texts are always wrong, and a 0 is taken for nothing found."""
    text, judged = str(row.get("res", said)), "res" in row
    if row.get("question_type") == "multi_choice":
        chosen = letter(text, dict(zip(ascii_uppercase, as_list(str(row.get("choices"))), strict=False)))
        return None if chosen is None and not judged else float(chosen == row.get("answer_option"))
    try:
        number = {"integer": int, "float": float}[row.get("answer_type")]
        right = number(text) == number(row["answer"]) and (judged or number(text) != 0)
    except (KeyError, ValueError):
        right = False
    return 1.0 if right else 0.0 if judged else None


def extract_by_rule(row: dict, said: str | None) -> dict:
    """In place of MathVista's judge: the row with the last number of the answer as "res", unless [K] needs no
    judge for it [ours]."""
    if said is None or mathvista(row, said) is not None:
        return row
    return {**row, "res": (re.findall(r"-?\d+(?:\.\d+)?", said.replace(",", "")) or [said])[-1]}


def judged(row: dict, said: str) -> float | None:
    return None if row.get("score") is None else float(row["score"])


def boxes(text: str) -> list[list[float]]:
    """All [x1, y1, x2, y2] in a text. What is no box of four numbers is left out."""
    number = r"\s*(\d+(?:\.\d+)?)\s*"
    return [list(map(float, box)) for box in re.findall(rf"\[{','.join([number] * 4)}\]", text)]


def same_boxes(answer: str, said: str) -> bool:
    """Whether each box of the one text has its like in the other: an intersection over union of at least 0.5,
    as RefCOCO counts. An answer without a readable box is never met."""
    def alike(a, b):
        overlap = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
        union = sum((right - left) * (bottom - top) for left, top, right, bottom in (a, b)) - overlap
        return overlap >= 0.5 * union > 0

    wanted, found = boxes(answer), boxes(said)
    return bool(wanted) and (all(any(alike(a, b) for b in found) for a in wanted)
                             and all(any(alike(a, b) for a in wanted) for b in found))


def own_question(row: dict, said: str) -> float | None:
    """With options, the answer is a letter, or the text of an option. Else what was said must be the answer,
    or name the same boxes, if the answer has a <box>."""
    if choices := options(row):
        letters = {text: key for key, text in choices.items()} | dict(zip(choices, choices, strict=True))
        return choice({**row, "answer": letters.get(row["answer"])}, said)
    named = [answer for answer in answers(row) if "<box>" in answer]
    return float(exact(row, said) or any(same_boxes(answer, said) for answer in named))


# ---------------------------------------------------------------- from the scores of rows to a number
# Each takes rows, with what was said as "prediction", and their scores. A score of None counts as 0.

def percent(rows: list[dict], scores: list) -> dict:
    return {"score": 100 * sum(score or 0 for score in scores) / max(1, len(scores)),
            "n": len(scores), "open": scores.count(None)}


def points(rows: list[dict], scores: list) -> dict:
    return {"score": sum(score or 0 for score in scores)}


def grouped(rows: list[dict], scores: list, key: Callable) -> list:
    """The lowest score of each group of rows with one key. It is None if nothing worse than None is there."""
    groups = defaultdict(list)
    for row, score in zip(rows, scores, strict=True):
        groups[key(row)].append(score)
    return [0.0 if 0 in group else None if None in group else min(group) for group in groups.values()]


def circular(rows: list[dict], scores: list) -> dict:
    """A question is asked with its options rotated, and counts if all of its rows are right."""
    return percent(rows, grouped(rows, scores, lambda row: int(row["index"]) % 1_000_000))


def mme(rows: list[dict], scores: list) -> dict:
    """For each category, % of questions plus % of pictures whose two questions are right; their sum."""
    table = {}
    for category in sorted({row.get("category", "") for row in rows}):
        part = [i for i, row in enumerate(rows) if row.get("category", "") == category]
        asked, right = [rows[i] for i in part], [scores[i] for i in part]
        both = grouped(asked, right, lambda row: row.get("image_path"))
        table[category] = percent(asked, right)["score"] + percent(asked, both)["score"]
    cognition = {"code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation"}
    return {"score": sum(table.values()),
            "perception": sum(value for category, value in table.items() if category not in cognition),
            "cognition": sum(value for category, value in table.items() if category in cognition)}


def hallusion(rows: list[dict], scores: list) -> dict:
    """The mean of three: % right of questions, of figures (all of their questions are right), and of
    questions that are asked about several figures (right about all)."""
    def key(row):                                  # category, set, figure, question
        return [row.get("l2-category"), *row["index"].split("_")[3:6]]

    figure = grouped(rows, scores, lambda row: tuple(key(row)[:3]))
    question = grouped(rows, scores, lambda row: (*key(row)[:2], *key(row)[3:]))
    all_three = zip(("aAcc", "fAcc", "qAcc"), (scores, figure, question), strict=True)
    table = {name: percent(rows, right)["score"] for name, right in all_three}
    return {"score": sum(table.values()) / 3, **table}


def pope(rows: list[dict], scores: list) -> dict:
    """F1 of "Yes" in percent. A row counts once for each of its categories."""
    counts = defaultdict(int)                      # by (is Yes right?, was Yes said?)
    for row in rows:
        said_yes = yes_no_judged({"answer": "yes"}, row["prediction"] or "") == 1
        counts[row.get("answer") == "Yes", said_yes] += len(row.get("category", "").split(","))
    wrong = counts[True, False] + counts[False, True]
    return {"score": 200 * counts[True, True] / max(1, 2 * counts[True, True] + wrong)}


# ---------------------------------------------------------------- the table

class Benchmark(NamedTuple):
    split: str
    tiles: int | None                              # most tiles of a picture (None: the checkpoint's limit)
    prompt: str                                    # what is asked about {question}; OPTIONS: see `prompt`
    metric: Callable                               # of a row
    total: Callable                                # of all rows
    tokens: int                                    # longest answer; [K] allows 1024, [I] 10 to 1000
    v1: float | None                               # the first paper's score of Mono-InternVL-2B
    v15: float | None                              # that of 1.5-2B, second hand: from the tables of NEO
    note: str


SHORT = "Answer the question using a single word or phrase."
PLAIN, LINE, SPACE = "{question}", "{question}\n" + SHORT, "{question} " + SHORT
YES_NO, OPTIONS = "{question} Please answer yes or no. " + SHORT, "{question}, options and an instruction"
VAL, SECRET = "the papers' scores are on test", "the answers are secret: upload the file"
RULE, GPT = "extracted by rule: not comparable with the paper", "a GPT scores the answers: --judged FILE"
NEITHER, LETTERS = "in neither paper", "your own questions: exact match, letters, boxes"
# The files of MMMU and GQA are others since 2024-12. AI2D_TEST has masked letters, as the papers' has.
BENCHMARKS = {file: Benchmark(*columns) for file, *columns in (
    # file                  split       tiles prompt   metric         total   tokens   2B 1.5-2B note
    ("MMVet",                "test",        6, PLAIN,   judged,        percent,   1024, 40.1, 54.0, GPT),
    ("MMMU_DEV_VAL",         "validation", 12, OPTIONS, mmmu,          percent,    100, 33.7, 39.1, ""),
    ("MME",                  "test",        6, SPACE,   yes_no,        mme,        100, 1875, None, ""),
    ("MMBench_TEST_EN",      "test",        6, OPTIONS, choice,        circular,   100, 65.5, 64.0, SECRET),
    ("MMBench_DEV_EN",       "dev",         6, OPTIONS, choice,        circular,   100, 65.5, 64.0, VAL),
    ("MathVista_MINI",       "testmini",    6, PLAIN,   mathvista,     percent,   1024, 45.7, None, RULE),
    ("SEEDBench_IMG",        "image",       6, OPTIONS, choice,        percent,    100, 67.4, 66.9, ""),
    ("OCRBench",             "test",       24, LINE,    contains,      points,     100,  767,  801, ""),
    ("HallusionBench",       "image",       6, YES_NO,  yes_no_judged, hallusion,  100, 34.8, 32.5, ""),
    ("CCBench",              "dev",         6, OPTIONS, choice,        circular,   100, 66.3, None, ""),
    ("TextVQA_VAL",          "val",         6, LINE,    vqa,           percent,    100, 72.6, 73.7, ""),
    ("ScienceQA_TEST",       "test",        6, OPTIONS, choice,        percent,    100, 93.6, None, ""),
    ("GQA_TestDev_Balanced", "test-dev",    6, LINE,    exact,         percent,    100, 59.5, None, ""),
    ("DocVQA_TEST",          "test",       18, LINE,    anls,          percent,    100, 80.0, 81.7, SECRET),
    ("DocVQA_VAL",           "val",        18, LINE,    anls,          percent,    100, 80.0, 81.7, VAL),
    ("AI2D_TEST",            "test",        6, OPTIONS, choice,        percent,    100, 68.6, 67.4, ""),
    ("ChartQA_TEST",         "test",       12, LINE,    relaxed,       percent,    100, 73.7, 72.2, ""),
    ("InfoVQA_TEST",         "test",       24, LINE,    anls,          percent,    100, 43.0, 47.9, SECRET),
    ("InfoVQA_VAL",          "val",        24, LINE,    anls,          percent,    100, 43.0, 47.9, VAL),
    ("POPE",                 "test",        6, PLAIN,   yes_no,        pope,       100, None, None, NEITHER),
)}
OWN = Benchmark("", None, PLAIN, own_question, percent, 100, None, None, LETTERS)
# The columns that a metric or a total needs besides question and answer.
NEEDED_COLUMNS = {circular: ("index",), mme: ("category", "image_path"), hallusion: ("index", "l2-category"),
                  pope: ("category",), contains: ("category",),
                  mathvista: ("question_type", "answer_type", "choices", "answer_option")}


# ---------------------------------------------------------------- what evaluate.py calls

def pictures(row: dict) -> list[str]:
    """The base64 texts, or the file names, of a row's pictures, [] if both columns are empty."""
    named = str(row.get("image") or row.get("image_path") or "")
    return as_list(named) if named else []


def prompt(benchmark: str, row: dict, plain: bool = False) -> str:
    """The user turn with its <image> marks. benchmark: the TSV file's name without .tsv; any other is a file
    of your own questions, and without a picture is asked as text alone. plain: the bare question.

    [I] asks TextVQA, GQA, ChartQA, DocVQA and InfoVQA with a blank instead of the new line, strips options,
    and asks MMMU's open questions like TextVQA. [K] since 2024-12 ends with no <Image-1><Image-2>."""
    text, choices = row["question"], options(row)
    kind = BENCHMARKS.get(benchmark, OWN._replace(prompt=OPTIONS if choices else PLAIN)).prompt
    if plain:
        pass
    elif kind != OPTIONS:
        text = kind.format(question=text)
    else:
        hint = [] if row.get("hint") is None else [row["hint"]]
        text = "\n".join([*hint, text, *(f"{key}. {choice}" for key, choice in choices.items())])
        chinese = re.search("[\u4e00-\u9fff]", text)
        if choices:
            text += "\n请直接回答选项字母。" if chinese else \
                "\nAnswer with the option's letter from the given choices directly."
        else:
            text += "\n请直接回答问题。" if chinese else "\nAnswer the question directly."
    numbers = range(1, len(pictures(row)) + 1)
    if len(numbers) == 1 or not numbers and benchmark in BENCHMARKS:
        return "<image>\n" + text
    marks = "".join(f"Image-{i}: <image>\n" for i in numbers)
    return marks + text + "".join(f"<Image-{i}>" for i in numbers)


def score(benchmark: str, row: dict, prediction: str | None) -> float | None:
    """0 to 1 for what the model said about a row, by the paper's metric. None: left open, as [K] would ask a
    GPT. A row that could not be asked (prediction None) and one without an answer are wrong."""
    b = BENCHMARKS.get(benchmark, OWN)
    if prediction is None or row.get("answer") is None and b.metric is not judged:
        return 0.0
    return b.metric(row, prediction)


def scored_rows(benchmark: str, rows: list[dict]) -> list[bool]:
    """Which rows count: if some are of the benchmark's split (MMMU's file has two), only those."""
    of_split = [row.get("split") == BENCHMARKS.get(benchmark, OWN).split for row in rows]
    return of_split if any(of_split) else [True] * len(rows)


def aggregate(benchmark: str, rows: list[dict], predictions: list[str | None]) -> dict:
    """{"score": as the papers print it; "n": of how many questions; "open": how many of them [K] would ask a
    GPT about; "at_most": the score if it found them all right; "parts": {split or category: its score},
    "part_rows": {the same: how many rows}}. Of the circular benchmarks, a question is all of its rows, right
    or wrong together."""
    total = BENCHMARKS.get(benchmark, OWN).total
    rows = [{**row, "prediction": said} for row, said in zip(rows, predictions, strict=True)]
    rows = [row for row, counts in zip(rows, scored_rows(benchmark, rows), strict=True) if counts]
    scores = [score(benchmark, row, row["prediction"]) for row in rows]
    result = {"n": len(rows), "open": scores.count(None), **total(rows, scores), "parts": {},
              "part_rows": {}}
    result["at_most"] = total(rows, [1.0 if s is None else s for s in scores])["score"]
    for column in ("split", "l2-category", "category", "task", "skills"):
        members = defaultdict(list)                # POPE and MMVet separate several names by a comma
        for i, row in enumerate(rows):
            for names in as_list(row[column]) if row.get(column) is not None else []:
                for name in re.split(",(?! )", names):
                    members[name].append(i)
        for name in sorted(members):
            part = [{**rows[i], column: name} for i in members[name]]
            result["parts"][name] = total(part, [scores[i] for i in members[name]])["score"]
            result["part_rows"][name] = len(part)
    return result


# ---------------------------------------------------------------- the file

class Tsv:
    """A benchmark's TSV file, read in one pass. rows[i] has the texts of a row. Its pictures stay in the
    file, where `read` finds them again. Rows without a picture are left out, as in [K]; of your own
    questions, they are text alone. Raises InputError if the file is damaged or lacks a column that this
    benchmark needs."""

    def __init__(self, path: Path, benchmark: str):
        csv.field_size_limit(2 ** 31 - 1)          # a picture is one field of the file
        self.path, self.rows, self.by_index, self.left_out = path, [], {}, 0
        self.offsets, self.checksums = [], []      # of each row: where it begins, CRC-32
        b, records, self.own = BENCHMARKS.get(benchmark, OWN), self.records(0), benchmark not in BENCHMARKS
        self.columns = [name.removeprefix("\ufeff") for name in next(records, (0, []))[1]]
        wanted = {"question", *NEEDED_COLUMNS.get(b.total, ()), *NEEDED_COLUMNS.get(b.metric, ())}
        wanted |= set() if b.note == SECRET else {"answer"}
        wanted |= set() if "image_path" in self.columns else {"image"}
        if missing := sorted(wanted - set(self.columns)):
            raise InputError(f"{path} has no column {', '.join(missing)}; expected tab-separated text whose "
                             f"first line names the columns, not {', '.join(self.columns)!r:.100}")
        for offset, fields in records:
            row = self.as_row(fields)
            row.setdefault("index", str(len(self.rows)))
            if b.total is circular and not row["index"].isdecimal():
                raise InputError(f"{path}: an index is {row['index']!r:.40}, expected a number")
            seen = row.pop("image", None if "image" in self.columns else row.get("image_path"))
            if not seen and not self.own:
                self.left_out += 1
                continue
            self.by_index[row["index"]] = len(self.rows)
            self.rows.append(row)
            self.offsets.append(offset)
            self.checksums.append(zlib.crc32("\t".join(fields).encode()))
        if not self.rows:
            raise InputError(f"{path} has no row with a picture")

    def records(self, offset: int) -> Iterator[tuple[int, list[str]]]:
        """(place in the file, fields) of each record from there on. A record may be several lines long."""
        try:
            with open(self.path, "rb") as file:
                file.seek(offset)
                lines = (line.decode() for line in iter(file.readline, b""))
                reader = csv.reader(lines, delimiter="\t", strict=True)
                # csv takes line by line, so that file.tell() is always where the next record begins.
                while (fields := next(reader, None)) is not None:
                    if fields:                     # not a blank line
                        yield offset, fields
                    offset = file.tell()
        except OSError as e:
            raise InputError(f"{self.path} is not readable: {e.strerror}") from None
        except (csv.Error, UnicodeDecodeError) as e:
            raise InputError(f"{self.path} is damaged or was cut off: {e}, in the record that begins at byte "
                             f"{offset}") from None

    def as_row(self, fields: list[str]) -> dict[str, str]:
        if len(fields) != len(self.columns):
            raise InputError(f"{self.path} is damaged or was cut off: record {' '.join(fields)!r:.40} has "
                             f"{len(fields)} columns, the header {len(self.columns)}")
        return {name: text for name, text in zip(self.columns, fields, strict=True) if text not in MISSING}

    def read(self, i: int) -> tuple[dict, list]:
        """(row i with its image column, its pictures: open files or paths)."""
        row = self.as_row(next(self.records(self.offsets[i]))[1])
        if "question" not in row or not any(pictures(row)) and not self.own:
            raise InputError(f"it has no {'picture' if 'question' in row else 'question'}")
        if "image" not in row:
            return row, [self.path.parent / name for name in pictures(row)]
        if len(row["image"]) <= 64:                # the index of another row, which has the same picture
            other = self.by_index.get(row["image"])
            image = "" if other is None else self.as_row(
                next(self.records(self.offsets[other]))[1]).get("image", "")
            if len(image) <= 64:
                raise InputError(f"its image {row['image']!r} is no index of a row with a picture")
            row["image"] = image
        try:
            return row, [io.BytesIO(base64.b64decode(text)) for text in pictures(row)]
        except ValueError as e:
            raise InputError(f"its image is not base64: {e}") from None
