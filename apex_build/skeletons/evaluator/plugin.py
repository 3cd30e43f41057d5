"""An evaluator: how varied what the model writes is."""

from apex_build.plugin_api import Evaluator, Figure, Parameter, Task, hookimpl

APEX_API = 3
PARAMETERS = {"n_predict": Parameter(64, "int", "tokens written after each prompt")}


def evaluate(task: Task) -> list[Figure]:
    with task.serve("--ctx-size", "2048", "--parallel", "1") as server:
        length = task.number("n_predict")
        words = [server.completion(prompt.text, n_predict=length)["content"].split() for prompt in task.prompts]
    share = 100 * sum(len(set(of)) for of in words) / max(1, sum(map(len, words)))
    return [Figure("distinct", share, unit="%", n=len(words), better="higher", label="distinct words", plot=True)]


@hookimpl
def apex_evaluators() -> list[Evaluator]:
    return [Evaluator("my-name", evaluate, ("prompts",), parameters=PARAMETERS, description="distinct words")]
