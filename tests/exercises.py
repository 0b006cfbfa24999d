"""Three exercises for a class. Write what raises NotImplementedError, then ask whether it works:

    python -m pytest tests/test_exercises.py -rs

An exercise that is not solved yet is skipped. Each ends with an experiment: say beforehand what you
expect, then run it. tests/exercises_solved.py holds a solution of the first two; the third has no one
solution, and its test reads the table that you found.
"""

from purify import Choice

# 1. A purifier of your own: the majority vote
#
# Ask all teachers. The choice on which most of their rationales conclude wins, and the first teacher
# who concludes on it writes. Where no rationale concludes on anything, the first teacher writes. The
# vote must not know the right answer. `self.teachers.all_rationales(questions)` gives N lists of M
# texts, `kp.conclusion(text, q.choices)` the index that a text concludes on, or None.
#
# The experiment: add it to purify.PURIFIERS as "majority", and compare it with the router and with
# TinyLLM. It reads every rationale. When is that worth its price, and why is the majority wrong where
# one teacher in four knows a subject?
#
#     python eval.py --compare "--purifier majority" "--purifier router" "--purifier none" --seeds 3


class MajorityVote(Choice):
    def choose(self, questions):
        """Return P(m | q), (N, M): 1 for the teacher who writes. `self.certain` makes it of picks."""
        raise NotImplementedError


# 2. A teacher who lies
#
# Write rationales that argue for a wrong choice, in the form in which the others argue: each must end
# with "the answer is X." where X is a wrong choice of that question, and be the same at each call.
#
# The experiment: write them to a file, one line {"id": ..., "rationale": ..., "score": ...} a
# question, and give it to TinyLLM and to the router as a fifth teacher, once with "score": 0.0 and
# once with "score": 1.0, the score of a liar who claims to be sure. Who believes what?
#
#     python train.py --purifier router --teachers t5 llama-2 mistral llama-3.1 /path/to/liar.jsonl


def lies(questions):
    """Return {id: rationale} of these questions."""
    raise NotImplementedError


# 3. When does TinyLLM win?
#
# Find arguments of train.py with which TinyLLM (--purifier none) ends above the router, by more than
# chance: over three seeds or more, the 95 % interval of the difference lies above 0. Both rows take
# the same arguments, except for the purifier. (The teachers may agree, the rationales may weigh little,
# a router may have little to be fitted on.)
#
#     python eval.py --compare "--purifier none ..." "--purifier router ..." --seeds 3 --out out/exercise-3
#
# Say why it wins there, and whether the reason would hold for a real set of teachers.

WHERE_TINYLLM_WINS = None  # "out/exercise-3/compare.json"
