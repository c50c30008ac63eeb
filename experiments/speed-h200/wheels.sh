#!/bin/sh
# What a machine with torch and Triton lacks, as wheels for Python 3.12 in wheels/ beside this file: run it
# where a package registry can be reached; the folder is never committed.
set -e
cd "$(dirname "$0")"
mkdir -p wheels
pip wheel --no-deps -w wheels antlr4-python3-runtime==4.9.3 # has no wheel of its own
pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d wheels \
    hydra-core==1.3.2 omegaconf==2.3.0 \
    liger-kernel==0.8.5 cut-cross-entropy==25.1.1 \
    torchtitan==0.3.0 spmd-types==0.2.3 tyro==1.0.17 docstring-parser==0.18.0 shtab==1.13.0 typeguard==4.6.0 \
    st-moe-pytorch==0.1.8 colt5-attention==0.11.2 local-attention==1.11.2 hyper-connections==0.4.11 beartype==0.23.1 \
    torchtune==0.6.1 torchao==0.15.0 torchdata==0.11.0 datasets==4.4.1 dill==0.4.0 multiprocess==0.70.18 xxhash==3.6.0
du -sm wheels
