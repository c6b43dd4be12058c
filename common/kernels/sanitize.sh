#!/bin/sh
# Runs the CPU kernel under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer:
#     common/kernels/sanitize.sh     with the compiler that CXX names, or c++
set -eu
cd "$(dirname "$0")"
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
for sanitizer in address undefined thread; do
    echo "== $sanitizer"
    "${CXX:-c++}" -O1 -g -std=c++17 -pthread -Wno-psabi "-fsanitize=$sanitizer" \
        -fno-sanitize-recover=all gru.cpp driver.cpp -o "$build/$sanitizer"
    # Without address randomisation, which ThreadSanitizer does not get on with on new kernels.
    if command -v setarch >/dev/null && setarch -R true 2>/dev/null; then
        setarch -R "$build/$sanitizer"
    else
        "$build/$sanitizer"
    fi
done
