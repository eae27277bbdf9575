#!/usr/bin/env bash
# Somebody else's repository of kernels, with the files and the job of docs/ci.md.
source "$(dirname "$0")/common.sh" "$@"
environment
python - "$ROOT/docs/ci.md" <<'END'
import pathlib, re, sys
page = pathlib.Path(sys.argv[1]).read_text()
for name, text in re.findall(r"^`([\w./]+)`\n\n```\w+\n(.*?)^```$", page, re.M | re.S):
    path = pathlib.Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
pathlib.Path("kernels/__init__.py").touch()
END
job=$(sed -n '/^  simulate:/,/^  #/s/^      - run: //p' .github/workflows/kernels.yml)
[ "$(grep -c . <<<"$job")" = 3 ] || fail "the job has other steps: $job"
while read -r step; do
  case $step in
    "pip install nsa-neuron pytest") pip install --quiet "$WHEEL" pytest ;;
    pytest) expect 0 "8 passed" pytest -p no:cacheprovider ;;
    *) expect 0 "0 errors" $step ;;
  esac
done <<<"$job"
expect 0 "NOT run on hardware" pytest -p no:cacheprovider -m nki_hardware

sed -i 's/scale\[0:n, :\]/scale/' kernels/rmsnorm.py
expect 1 "rule    partition-match" pytest -p no:cacheprovider -k "simulated and 300 and 64"
say "a CI user is at home"
