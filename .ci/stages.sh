# Stages that run one after the other, whatever fails: `stage NAME COMMAND...` for each, then
# `stages_end`, which prints what each took and returns the worst status.

stages_status=0
stages_table=

stage() {
    local name=$1 begin=$SECONDS status=0
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    "$@" || status=$?
    if ((status > stages_status)); then stages_status=$status; fi
    stages_table+=$(printf '%-14s %4d s  ' "$name" $((SECONDS - begin)))
    if ((status)); then stages_table+="FAILED, status $status"; else stages_table+=ok; fi
    stages_table+=$'\n'
}

stages_end() {
    printf '\n%s%-14s %4d s\n' "$stages_table" total "$SECONDS"
    return "$stages_status"
}
