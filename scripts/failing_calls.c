/* Lets the n-th call that changes a file fail, or kills the process at it: loaded by LD_PRELOAD for kill_test.py.

   Calls are counted over a process and what it forks, in order: writes to files (not to pipes or the terminal),
   fsyncs, renames, new folders, changes of length, and files opened to be made. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE, SYNC, RENAME, MAKE, LENGTH, KINDS };
typedef struct { atomic_long seen, kinds[KINDS]; long at; int error; } Plan;
static Plan *plan;

/* From now on: the call number ``at`` fails with ``error``, or kills where that is 0; at 0 nothing does. */
void arm(long at, int error) {
    plan = mmap(0, sizeof *plan, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    plan->at = at;
    plan->error = error;
}

/* How many calls of a kind were seen; of all kinds for -1. */
long seen(int kind) { return plan ? (kind < 0 ? plan->seen : plan->kinds[kind]) : 0; }

static int fails(int kind) {
    if (!plan) return 0;
    plan->kinds[kind]++;
    long number = ++plan->seen;
    int full = plan->error == ENOSPC && kind != SYNC && kind != RENAME; /* a disk that is full stays full */
    if (!plan->at || number < plan->at || (number > plan->at && !full)) return 0;
    if (!plan->error) {
        kill(getpid(), SIGKILL);
        pause();
    }
    errno = plan->error;
    return 1;
}

static int file(int fd) {
    struct stat s;
    return !fstat(fd, &s) && S_ISREG(s.st_mode);
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__)) dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *b, size_t n) {
    REAL(ssize_t, write, int, const void *, size_t);
    return file(fd) && fails(WRITE) ? -1 : real(fd, b, n);
}
ssize_t writev(int fd, const struct iovec *v, int n) {
    REAL(ssize_t, writev, int, const struct iovec *, int);
    return file(fd) && fails(WRITE) ? -1 : real(fd, v, n);
}
ssize_t pwrite(int fd, const void *b, size_t n, off_t o) {
    REAL(ssize_t, pwrite, int, const void *, size_t, off_t);
    return file(fd) && fails(WRITE) ? -1 : real(fd, b, n, o);
}
ssize_t pwrite64(int fd, const void *b, size_t n, off64_t o) {
    REAL(ssize_t, pwrite64, int, const void *, size_t, off64_t);
    return file(fd) && fails(WRITE) ? -1 : real(fd, b, n, o);
}
ssize_t sendfile(int out, int in, off_t *o, size_t n) {
    REAL(ssize_t, sendfile, int, int, off_t *, size_t);
    return file(out) && fails(WRITE) ? -1 : real(out, in, o, n);
}
ssize_t copy_file_range(int in, off64_t *a, int out, off64_t *b, size_t n, unsigned f) {
    REAL(ssize_t, copy_file_range, int, off64_t *, int, off64_t *, size_t, unsigned);
    return fails(WRITE) ? -1 : real(in, a, out, b, n, f);
}
int fsync(int fd) {
    REAL(int, fsync, int);
    return fails(SYNC) ? -1 : real(fd);
}
int fdatasync(int fd) {
    REAL(int, fdatasync, int);
    return fails(SYNC) ? -1 : real(fd);
}
int rename(const char *a, const char *b) {
    REAL(int, rename, const char *, const char *);
    return fails(RENAME) ? -1 : real(a, b);
}
int renameat(int c, const char *a, int d, const char *b) {
    REAL(int, renameat, int, const char *, int, const char *);
    return fails(RENAME) ? -1 : real(c, a, d, b);
}
int renameat2(int c, const char *a, int d, const char *b, unsigned f) {
    REAL(int, renameat2, int, const char *, int, const char *, unsigned);
    return fails(RENAME) ? -1 : real(c, a, d, b, f);
}
int mkdir(const char *a, mode_t m) {
    REAL(int, mkdir, const char *, mode_t);
    return fails(MAKE) ? -1 : real(a, m);
}
int mkdirat(int c, const char *a, mode_t m) {
    REAL(int, mkdirat, int, const char *, mode_t);
    return fails(MAKE) ? -1 : real(c, a, m);
}
int ftruncate(int fd, off_t n) {
    REAL(int, ftruncate, int, off_t);
    return fails(LENGTH) ? -1 : real(fd, n);
}
int ftruncate64(int fd, off64_t n) {
    REAL(int, ftruncate64, int, off64_t);
    return fails(LENGTH) ? -1 : real(fd, n);
}

static mode_t mode_of(int flags, va_list more) { return flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; }

#define MODE \
    va_list more; \
    va_start(more, flags); \
    mode_t mode = mode_of(flags, more); \
    va_end(more)

int open(const char *path, int flags, ...) {
    REAL(int, open, const char *, int, mode_t);
    MODE;
    return flags & O_CREAT && fails(MAKE) ? -1 : real(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    REAL(int, open64, const char *, int, mode_t);
    MODE;
    return flags & O_CREAT && fails(MAKE) ? -1 : real(path, flags, mode);
}
int openat(int at, const char *path, int flags, ...) {
    REAL(int, openat, int, const char *, int, mode_t);
    MODE;
    return flags & O_CREAT && fails(MAKE) ? -1 : real(at, path, flags, mode);
}
int openat64(int at, const char *path, int flags, ...) {
    REAL(int, openat64, int, const char *, int, mode_t);
    MODE;
    return flags & O_CREAT && fails(MAKE) ? -1 : real(at, path, flags, mode);
}
