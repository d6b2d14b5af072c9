#!/usr/bin/env bash
# What the launch scripts for accelerators share; sourced with the script's arguments. Takes a leading
# --dry_run off them ("$@" of the script: shift if dry_run is set); do_it then prints instead of running.
dry_run=""
[ "${1:-}" != --dry_run ] || dry_run=1

do_it() {
  if [ -n "$dry_run" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

usage() { # the comment at the top of the script, as help
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2
  exit 2
}
