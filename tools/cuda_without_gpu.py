"""CUDA's libraries without a GPU: each function that ONNX Runtime's provider wants, doing nothing but what it must to go on.

Memory is the host's, handles are bytes that nobody reads, and there is one GPU of compute capability 8.9 with 80 GB. Functions
that launch a kernel or a product of matrices write its name on standard error, after `KERNEL `. Linux; needs `readelf` and a C
compiler.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

PRELUDE = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static void say(const char *what) { fprintf(stderr, "KERNEL %s\\n", what); }
"""

# In the layout of CUDA 13, in which the library was compiled. A kernel's name is known from when it is registered.
RUNTIME = """
int cudaGetDeviceProperties(char *p, int device) {
  memset(p, 0, 1008);
  *(size_t *)(p + 288) = (size_t)80 << 30;                               /* memory */
  *(size_t *)(p + 296) = 49152; *(int *)(p + 304) = 65536;               /* shared memory and registers of a block */
  *(int *)(p + 308) = 32; *(int *)(p + 320) = 1024;                      /* threads of a warp and of a block */
  *(int *)(p + 360) = 8; *(int *)(p + 364) = 9; *(int *)(p + 388) = 108; /* compute capability, multiprocessors */
  return 0;
}
int cudaDeviceGetAttribute(int *value, int which, int device) {
  *value = which == 75 ? 8 : which == 76 ? 9 : which == 16 ? 108 : which == 10 ? 32 : 0;
  return 0;
}
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaMalloc(void **p, size_t n) { *p = aligned_alloc(256, (n + 256) / 256 * 256); return 0; }
int cudaMallocHost(void **p, size_t n) { *p = malloc(n); return 0; }
int cudaHostAlloc(void **p, size_t n) { *p = malloc(n); return 0; }
int cudaMallocFromPoolAsync(void **p, size_t n) { *p = malloc(n); return 0; }
int cudaFree(void *p) { free(p); return 0; }
int cudaFreeHost(void *p) { free(p); return 0; }
int cudaFreeAsync(void *p) { free(p); return 0; }
int cudaMemcpy(void *to, const void *from, size_t n) { memcpy(to, from, n); return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t n) { memcpy(to, from, n); return 0; }
int cudaMemset(void *p, int value, size_t n) { memset(p, value, n); return 0; }
int cudaMemsetAsync(void *p, int value, size_t n) { memset(p, value, n); return 0; }
int cudaMemGetInfo(size_t *left, size_t *all) { *left = (size_t)70 << 30; *all = (size_t)80 << 30; return 0; }
int cudaPointerGetAttributes(char *found, const void *p) { memset(found, 0, 32); *(int *)found = 2; return 0; }
int cudaStreamIsCapturing(void *stream, int *value) { *value = 0; return 0; }
int cudaEventElapsedTime(float *time) { *time = 1; return 0; }
int cudaFuncGetAttributes(char *found, const void *f) { memset(found, 0, 128); return 0; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count) { *count = 1; return 0; }
int cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned v, unsigned long long flags, int *status) {
  *f = 0;
  if (status) *status = 1;
  return 0;
}
static void *none[64];
void **__cudaRegisterFatBinary(void *p) { return none; }
static const void *kernels[400000];
static const char *names[400000];
static int known;
void __cudaRegisterFunction(void **binary, const void *kernel, char *device, const char *name) {
  kernels[known] = kernel;
  names[known++] = strdup(name);
}
static int launched(const void *kernel) {
  for (int i = 0; i < known; i++)
    if (kernels[i] == kernel) { say(names[i]); return 0; }
  say("unknown");
  return 0;
}
int __cudaGetKernel(const void **found, const void *kernel) { *found = kernel; return 0; }
int __cudaLaunchKernel(const void *kernel) { return launched(kernel); }
int cudaLaunchKernel(const void *kernel) { return launched(kernel); }
int cudaLaunchCooperativeKernel(const void *kernel) { return launched(kernel); }
int cudaLaunchKernelExC(const void *config, const void *kernel) { return launched(kernel); }
"""

# What is multiplied by its types, as CUDA numbers them: float32 0, float16 2, int8 3, int32 10.
PRODUCTS = """
static int multiplied(int left, int right, int result) {
  char what[80];
  snprintf(what, 80, "cublas %d x %d -> %d", left, right, result);
  say(what);
  return 0;
}
int cublasGemmEx(void *h, int ta, int tb, int m, int n, int k, void *alpha, void *a, int at, int la, void *b, int bt, int lb,
                 void *beta, void *c, int ct) { return multiplied(at, bt, ct); }
int cublasGemmStridedBatchedEx(void *h, int ta, int tb, int m, int n, int k, void *alpha, void *a, int at, int la, long long sa,
                               void *b, int bt, int lb, long long sb, void *beta, void *c, int ct) { return multiplied(at, bt, ct); }
int cublasSgemm_v2(void) { return multiplied(0, 0, 0); }
int cublasSgemmStridedBatched(void) { return multiplied(0, 0, 0); }
int cublasGetMathMode(void *h, int *mode) { *mode = 0; return 0; }
"""  # noqa: E501  C

REDUCTIONS = """
size_t cudnnGetVersion(void) { return 91000; }
int cudnnGetReductionWorkspaceSize(void *h, void *r, void *a, void *b, size_t *n) { *n = 256; return 0; }
int cudnnGetReductionIndicesSize(void *h, void *r, void *a, void *b, size_t *n) { *n = 256; return 0; }
"""

GIVEN = {"libcudart": RUNTIME, "libcublas": PRODUCTS, "libcudnn": REDUCTIONS}
HANDLES = re.compile(r"(Create(WithFlags|_v2)?|Instantiate)$|^cudnnCreate")  # functions that hand out something to hold
TEXTS = re.compile(r"(Error|Status)(Name|String)$")
DEFINED = re.compile(r"^\w[\w *]*?(\w+)\(", re.MULTILINE)


def wanted_symbols(library: Path) -> dict[str, list[str]]:
    """What a library wants of each one of CUDA's, by the name of that."""
    command = ["readelf", "-W", "--dyn-syms", "-d", str(library)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", said)
    wanted: dict[str, list[str]] = {name: [] for name in needed if name.startswith("libcu")}
    driver = next(name for name in wanted if name.startswith("libcuda."))
    for name in re.findall(r" UND (\S+)", said):
        symbol, _, version = name.partition("@")
        if version in wanted:
            wanted[version].append(symbol)
        elif not version and symbol.startswith("cu"):
            wanted[driver].append(symbol)
    names = set(re.findall(rb"\0(cudnn[A-Z][A-Za-z0-9_]+)(?=\0)", library.read_bytes()))  # looked up when first used
    return {**wanted, "libcudnn.so": [name.decode() for name in names]}


def source_of(library: str, symbols: Iterable[str]) -> str:
    """Of one of CUDA's libraries, in C."""
    given = GIVEN.get(library.split(".", maxsplit=1)[0], "")
    lines = [PRELUDE, given, "int loaded(void) { return 1; }"]
    for symbol in sorted(set(symbols) - set(DEFINED.findall(given))):
        if TEXTS.search(symbol):
            lines.append(f'const char *{symbol}(int error) {{ return "none"; }}')
        elif HANDLES.search(symbol):
            lines.append(f"int {symbol}(void **handle) {{ *handle = malloc(64); return 0; }}")
        else:
            lines.append(f"int {symbol}(void) {{ return 0; }}")
    return "\n".join(lines) + "\n"


def compile_cuda(wanted: Mapping[str, Iterable[str]], folder: Path) -> None:
    """The libraries, in the folder."""
    for name, symbols in wanted.items():
        code, versions = folder / f"{name}.c", folder / f"{name}.map"
        code.write_text(source_of(name, symbols))
        versions.write_text(f"{name} {{ global: *; }};\n")
        settings = ["-shared", "-fPIC", "-w", f"-Wl,-soname,{name}"]
        settings += [] if name.startswith(("libcuda.", "libcudnn.")) else [f"-Wl,--version-script={versions}"]
        subprocess.run(["cc", *settings, code, "-o", folder / name], check=True)
