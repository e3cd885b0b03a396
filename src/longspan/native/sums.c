/* Sums of arrays over processes, or threads, that have memory in common.
 *
 * Holds one operation for CPUs, in plain C. Must not know Python, torch, or what is added. Called from
 * longspan/native/sums.py; longspan/comm/shared_sums.py says who makes the memory, and what happens when nobody comes.
 *
 * Note [Two slots]
 *     Every member has a place, with the number of the last step for which it has written its part, and two slots that
 *     take turns. It writes step s into slot s % 2, says so, waits until all have, and adds the parts in the order of
 *     members. No second wait is needed: whoever writes step s has seen all others say s - 1, which they do only when
 *     they have read all slots of s - 2, and these are the slots that are written now.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <limits.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define LINE 128  /* bytes between places: no two share a cache line, nor the one that is fetched with it */
#define LOOKS 64  /* looks at a place between two at the clock */
#define BLOCK 512 /* elements that are added over all members before the next ones */

struct place {
    uint32_t step;     /* last step for which the member has written its part */
    uint32_t sleepers; /* members that sleep until `step` changes */
};

static struct place *place_of(char *memory, int member) { return (struct place *)(memory + (long)member * LINE); }

static float *slot_of(char *memory, int size, long slot_bytes, int member, uint32_t step)
{
    return (float *)(memory + (long)size * LINE + (2L * member + step % 2) * slot_bytes);
}

static int has_come(const struct place *place, uint32_t step)
{
    return (int32_t)(__atomic_load_n(&place->step, __ATOMIC_ACQUIRE) - step) >= 0;
}

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * (int64_t)1000000000 + now.tv_nsec;
}

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void say(struct place *place, uint32_t step)
{
    __atomic_store_n(&place->step, step, __ATOMIC_SEQ_CST);
#ifdef __linux__
    if (__atomic_load_n(&place->sleepers, __ATOMIC_SEQ_CST)) /* who counts itself later sees the new step */
        syscall(SYS_futex, &place->step, FUTEX_WAKE, INT_MAX, 0, 0, 0);
#endif
}

/* Sleep until the place changes, at most so long. */
static void sleep_at(struct place *place, uint32_t step, int64_t most_ns)
{
#ifdef __linux__
    __atomic_fetch_add(&place->sleepers, 1, __ATOMIC_SEQ_CST);
    const uint32_t seen = __atomic_load_n(&place->step, __ATOMIC_SEQ_CST);
    if ((int32_t)(seen - step) < 0) {
        const struct timespec most = {most_ns / 1000000000, most_ns % 1000000000};
        syscall(SYS_futex, &place->step, FUTEX_WAIT, seen, &most, 0, 0); /* not if it has changed meanwhile */
    }
    __atomic_fetch_sub(&place->sleepers, 1, __ATOMIC_SEQ_CST);
#else
    const struct timespec little = {0, most_ns < 50000 ? most_ns : 50000};
    nanosleep(&little, 0);
#endif
}

/* What a wait came to: Waited of native/sums.py. */
enum { WAS_THERE = 0, LOOKED = 1, SLEPT = 2, MISSING = 3, REFUSED = 4 };

/* Wait until the member has written its part of a step: it is looked for without sleep first, and then slept for. */
static int wait_for(struct place *place, uint32_t step, int64_t look_ns, int64_t wait_ns)
{
    if (has_come(place, step))
        return WAS_THERE;
    const int64_t start = now_ns();
    for (int64_t passed = 0; passed < look_ns; passed = now_ns() - start)
        for (int look = 0; look < LOOKS; look++) {
            if (has_come(place, step))
                return LOOKED;
            relax();
        }
    for (int64_t passed = now_ns() - start; passed < look_ns + wait_ns; passed = now_ns() - start) {
        sleep_at(place, step, look_ns + wait_ns - passed);
        if (has_come(place, step))
            return SLEPT;
    }
    return MISSING;
}

/* Add the parts of all members, [count] float32 each, in the order of members: out has the same bits in all of them.
 *
 * memory: size places of 128 bytes, then two slots of slot_bytes for every member; zeros before the first step, which
 * is 1. All members make the same calls. is_posted: whether this step's part was written by an earlier call that
 * returned MISSING. Returns the longest kind of wait that was needed; MISSING when some member has not come for wait_ns
 * beyond look_ns; REFUSED when a size is not supported (nothing is written then).
 */
int longspan_shared_sum(char *memory, int index, int size, long slot_bytes, uint32_t step, int is_posted,
                        const float *part, float *out, long count, int64_t look_ns, int64_t wait_ns)
{
    if (size < 1 || index < 0 || index >= size || count < 0 || count * (long)sizeof *part > slot_bytes || slot_bytes % 64)
        return REFUSED;
    if (!is_posted) {
        memcpy(slot_of(memory, size, slot_bytes, index, step), part, count * sizeof *part);
        say(place_of(memory, index), step);
    }
    int longest = WAS_THERE;
    for (int member = 0; member < size && longest != MISSING; member++) {
        const int wait = member == index ? WAS_THERE : wait_for(place_of(memory, member), step, look_ns, wait_ns);
        longest = wait > longest ? wait : longest;
    }
    if (longest == MISSING)
        return MISSING;
    for (long start = 0; start < count; start += BLOCK) {
        const long end = start + BLOCK < count ? start + BLOCK : count;
        for (int member = 0; member < size; member++) {
            const float *one = member == index ? part : slot_of(memory, size, slot_bytes, member, step);
            if (member == 0)
                memcpy(out + start, one + start, (end - start) * sizeof *out);
            else
                for (long i = start; i < end; i++)
                    out[i] += one[i];
        }
    }
    return longest;
}
