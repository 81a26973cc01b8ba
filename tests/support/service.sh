# What the scripts that run a real service for tests share. To be sourced.

# need COMMAND PACKAGE: installs the package if the command is missing and that is possible without asking.
need() {
  local name=${0##*/}
  command -v "$1" >/dev/null && return
  if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    echo "$name: installing $2" >&2
    { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "$2"; } >&2
  else
    echo "$name: $1 is missing; type: sudo apt-get install -y $2" >&2
    exit 1
  fi
}

# hold PID: returns when the other end of standard input is closed, or the process has ended.
hold() {
  while kill -0 "$1" 2>/dev/null; do
    if read -r -t 1; then continue; elif [ $? -le 128 ]; then break; fi
  done
}

# end PID: kills a child process and waits until it has ended.
end() {
  kill -9 "$1" 2>/dev/null || true
  wait "$1" 2>/dev/null || true
}
