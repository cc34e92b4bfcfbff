#!/bin/sh
# Text from a shell. Needs valkey-cli or redis-cli (5 or later), and nothing of WiCore.
#
#   REDIS_URL=redis://127.0.0.1:6379/0 sh shell.sh "Once upon a time" 40
#
# Prints the job's id, each event as a line of JSON, and the result.
set -eu
cli=$(command -v valkey-cli || command -v redis-cli)
redis() { "$cli" -u "${REDIS_URL:-redis://127.0.0.1:6379/0}" "$@"; }
uuid() { cat /proc/sys/kernel/random/uuid 2>/dev/null || uuidgen; }
quoted() { printf '%s' "$1" | sed 's/[\\"]/\\&/g; s/.*/"&"/'; } # one line of text as JSON

job=$(uuid)
queue=$(printf 'wicore\006\0263') # normal; `wicore` is interactive, \0266 batch, \0269 background
body=$(printf '[[], {"kind": "completion", "prompt": %s, "max_tokens": %d, "temperature": 0}, {}]' \
  "$(quoted "$1")" "$2" | base64 | tr -d '\n')
message=$(printf '{"headers": {"task": "wicore.generate", "id": "%s"},
  "properties": {"delivery_tag": "%s", "body_encoding": "base64"},
  "content-type": "application/json", "content-encoding": "utf-8", "body": "%s"}' "$job" "$(uuid)" "$body")
redis LPUSH "$queue" "$message" >/dev/null
echo "$job"

last=0
ended=
while [ -z "$ended" ]; do
  # Answers at once with what the log holds after `last`; otherwise waits for the next event.
  reply=$(redis XREAD BLOCK 5000 STREAMS "wicore:log:$job" "0-$last")
  while IFS= read -r line; do
    case $line in
      0-*) last=${line#0-} ;;
      '{'*) printf '%s\n' "$line" ;;
    esac
    case $line in
      *'"type":"done"'* | *'"type":"failed"'* | *'"type":"cancelled"'* | *'"type":"expired"'*) ended=1 ;;
    esac
  done <<EOF
$reply
EOF
done
redis GET "celery-task-meta-$job"
