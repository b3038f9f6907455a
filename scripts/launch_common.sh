# What the launchers share; they source it. Each has `fail`.

# Reads [-n WORKERS] [-H HOST:SLOTS,...] [--dry_run] [OPTIONS] -- COMMAND into variables of these names.
read_arguments() {
  workers='' hosts='' hosts_elsewhere='' dry_run='' options=()
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$self"; exit ;;
      -n | -np | -H) [ $# -ge 2 ] || fail "$1 needs a value"
        if [ "$1" = -H ]; then hosts=$2; else workers=$2; fi
        shift 2 ;;
      --dry_run | --dry-run) dry_run=1; shift ;;
      -n[0-9=]* | -np[0-9=]* | -H?*) fail "write $1 as two words, as in -n 2" ;;
      -host* | --host*) hosts_elsewhere=1 options+=("$1"); shift ;;
      --) shift; break ;;
      *) options+=("$1"); shift ;;
    esac
  done
  rest=("$@")
  [ $# -gt 0 ] || fail "no command: write it after --, as in $self -n 2 -- python -m trainers.cifar"
  if [ -n "$hosts" ]; then
    [[ $hosts =~ ^[^:,]+:[1-9][0-9]*(,[^:,]+:[1-9][0-9]*)*$ ]] || fail "-H must be HOST:SLOTS,... Received: $hosts"
    slots=$(($(tr , '\n' <<< "$hosts" | cut -d: -f2 | paste -sd+)))
  elif [ -z "$workers" ]; then
    [ -z "$hosts_elsewhere" ] || fail "-n is needed where an option tells the hosts"
    gpus=$(nvidia-smi -L 2> /dev/null | grep -c ^GPU || true)
    slots=$((gpus > 0 ? gpus : 2))
  fi
  workers=${workers:-$slots}
  [[ $workers =~ ^[1-9][0-9]*$ ]] || fail "-n must be a positive number. Received: $workers"
  [ "$workers" -le "${slots:-$workers}" ] || fail "$workers workers, but -H $hosts has $slots slots"
}

# Prints "${command[@]}" with "${variables[@]}" for a shell to read.
print_command() {
  # shellcheck disable=SC2016
  printf 'cd %q && PATH=%q:$PATH' "$PWD" "$path"
  for word in "${variables[@]}" "${command[@]}"; do
    [[ $word =~ ^[[:alnum:]_./:,=@%^+-]+$ ]] || word=${word@Q}
    printf ' %s' "$word"
  done
  echo
}

path=$PWD/.venv/bin
variables=("TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}" "HOROVOD_LOG_LEVEL=${HOROVOD_LOG_LEVEL:-warning}")
