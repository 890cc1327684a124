# Completes the groups, choices and keys of `python -m llama_ft.NAME`; Hydra's own completion cannot follow `python -m`.
_llama_ft_complete() {
    local line=${COMP_LINE:0:COMP_POINT} word candidate typed=
    local command='^([^ ]+) +-m +(llama_ft\.[a-z]+) (.*)$'
    [[ $line =~ $command ]] || return
    local python=${BASH_REMATCH[1]} module=${BASH_REMATCH[2]} arguments=${BASH_REMATCH[3]}
    word=${arguments##* }
    # Where = parts words, only what follows it is replaced.
    [[ $COMP_WORDBREAKS == *=* && $word == *=* ]] && typed=${word%"${word##*=}"}
    while IFS= read -r candidate; do
        [[ $candidate == "$word"* ]] && COMPREPLY+=("${candidate#"$typed"}")
    done < <(COMP_LINE="$module $arguments" command "$python" -m "$module" -sc query=bash 2>/dev/null)
}
complete -o default -o nospace -F _llama_ft_complete python python3
