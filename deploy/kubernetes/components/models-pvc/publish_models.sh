# Publishes the models below SOURCE to the repository TARGET that running Tritons read. Needs busybox.
#
# A version, once published, never changes: its folder is copied beside its place and takes it by one rename. A changed
# version under an old number is refused, because a pod that restarts would serve other answers than its neighbours. What
# lies beside the versions (config, labels) is replaced file by file, the config last, when the versions it may name are there.
# KEEP_VERSIONS: `all`, or how many of a model's versions stay.

same() { # are the files in two folders the same, apart from those that begin with a dot?
  [ "$(cd "$1" && find . -type f ! -name '.*' | sort)" = "$(cd "$2" && find . -type f ! -name '.*' | sort)" ] || return 1
  (cd "$1" && find . -type f ! -name '.*') | while read -r file; do cmp -s "$1/$file" "$2/$file" || exit 1; done
}

put_folder() { # put_folder FROM PARENT NAME
  rm -rf "$2/.$3"
  cp -r "$1" "$2/.$3"
  mv -T "$2/.$3" "$2/$3" # not into it, if it has appeared meanwhile
}

put_file() { # put_file FROM PARENT NAME
  cp "$1" "$2/.$3"
  mv -f "$2/.$3" "$2/$3"
}

case "$KEEP_VERSIONS" in
  all) ;;
  '' | 0* | *[!0-9]*)
    echo "KEEP_VERSIONS is 'all' or a number from 1 on, not '$KEEP_VERSIONS'" >&2
    exit 2
    ;;
esac

refused=0
cd "$SOURCE"
for model in *; do
  [ -f "$model/config.pbtxt" ] || continue
  there="$TARGET/$model"
  if [ ! -e "$there" ]; then
    put_folder "$model" "$TARGET" "$model"
    echo "published $model"
    continue
  fi
  ok=1
  for version in "$model"/[1-9]*/; do
    [ -d "$version" ] || continue
    number=$(basename "$version")
    if [ -e "$there/$number" ] && ! same "$version" "$there/$number"; then
      echo "$model/$number is on the volume with other contents: give what is new a number of its own" >&2
      ok=0
    fi
  done
  if [ "$ok" = 0 ]; then # nothing of this model: its config may need the version that was refused
    refused=1
    continue
  fi
  for version in "$model"/[1-9]*/; do
    [ -d "$version" ] || continue
    number=$(basename "$version")
    [ -e "$there/$number" ] && continue
    put_folder "$version" "$there" "$number"
    echo "published $model/$number"
  done
  for file in "$model"/*; do
    name=$(basename "$file")
    if [ -f "$file" ] && [ "$name" != config.pbtxt ] && ! cmp -s "$file" "$there/$name"; then
      put_file "$file" "$there" "$name"
      echo "published $model/$name"
    fi
  done
  if ! cmp -s "$model/config.pbtxt" "$there/config.pbtxt"; then
    put_file "$model/config.pbtxt" "$there" config.pbtxt
    echo "published $model/config.pbtxt"
  fi
  if [ "$KEEP_VERSIONS" != all ]; then
    for number in $(cd "$there" && ls -d [1-9]* | sort -rn | tail -n "+$((KEEP_VERSIONS + 1))"); do
      mv -T "$there/$number" "$there/.$number" # gone for who lists, then taken apart
      rm -rf "$there/.$number"
      echo "removed $model/$number"
    done
  fi
done
exit "$refused"
