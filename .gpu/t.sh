cd $(dirname $0)/..
export PYTHONPATH=
ls
( timeout 560 python3 -m pytest -m gpu tests/test_gpu.py -q -x --no-header -k "layouts or blocks" "$@" 2>&1 | tail -150 ) > $OUT/log.txt
tail -60 $OUT/log.txt | cut -c1-300
