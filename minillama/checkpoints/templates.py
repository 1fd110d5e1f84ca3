"""Chat templates: programs that came with a model from a stranger, so they run in a process of their own, in Jinja's
sandbox, with limits on time and memory.

Run as a file, this is that process: it reads lines {"template": ..., "values": ...} and answers each with a line
{"text": ...} or {"error": ...}. It knows the names that transformers gives to templates, and nothing else.
"""

import atexit
import datetime
import json
import os
import subprocess
import sys
import threading

SECONDS, MEGABYTES, LETTERS = 5, 512, 2**22  # for one conversation
LOCK = threading.Lock()
CHILD = {}  # {process id of whoever started it: the process}


def render(template, values):
    """The text that a template makes of values. Raises ValueError where it refuses, fails, or takes too long."""
    with LOCK:
        child = CHILD.get(os.getpid()) or started()
        timer = threading.Timer(SECONDS, child.kill)
        timer.start()
        try:
            child.stdin.write(json.dumps({"template": template, "values": values}) + "\n")
            child.stdin.flush()
            answer = child.stdout.readline()
        except OSError:  # it has ended
            answer = ""
        timer.cancel()
        if not answer.endswith("\n"):
            stop()
            raise ValueError(
                f"the model's chat template takes more than {SECONDS} s or {MEGABYTES} MB, and was stopped"
            )
    answer = json.loads(answer)
    if "error" in answer:
        raise ValueError(f"the model's chat template refuses these messages: {answer['error']}")
    return answer["text"]


def started():
    """The process, once it is ready."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8")
    child = CHILD[os.getpid()] = subprocess.Popen([sys.executable, "-I", __file__], **pipes)
    child.stdout.readline()
    return child


@atexit.register
def stop():
    child = CHILD.pop(os.getpid(), None)
    if child is not None:
        child.kill()
        child.communicate()


# ── the process ──────────────────────────────────────────────────────────────────────────────────────────────────────


def environment():
    """Jinja's sandbox with what transformers gives to chat templates."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} … {% endgeneration %} marks the model's turn for training; the text stands inside."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def refuse(message):
        raise jinja2.TemplateError(str(message))

    def as_json(value, ensure_ascii=False, **options):
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    jinja.filters["tojson"] = as_json
    jinja.globals["raise_exception"] = refuse
    jinja.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return jinja


def serve():
    jinja = environment()
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEGABYTES * 2**20, MEGABYTES * 2**20))
    except ImportError:  # Windows
        pass
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            text = jinja.from_string(asked["template"]).render(asked["values"])
            answer = {"text": text} if len(text) <= LETTERS else {"error": f"it made more than {LETTERS:,} letters"}
        except Exception as error:  # a stranger's program may raise anything
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            answer = {"error": said[:300]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
