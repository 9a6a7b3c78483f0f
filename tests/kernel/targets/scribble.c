/* Writes a counter to random places in memory of three kinds, without a pause, and gives some of its private memory back.
 * First prints the three addresses.
 */
#define _GNU_SOURCE
#include <inttypes.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE_BYTES = 4096, BYTES = 32 << 20, PAGES = BYTES / PAGE_BYTES, KINDS = 3, PRIVATE = 0 };

static uint64_t next_random(void)
{
    static uint64_t x = UINT64_C(88172645463325252);
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return x;
}

int main(void)
{
    const int private_file = memfd_create("private", 0), shared_file = memfd_create("shared", 0);
    char *memory[KINDS];
    if (private_file < 0 || shared_file < 0 || ftruncate(private_file, BYTES) || ftruncate(shared_file, BYTES))
        return 1;
    memory[PRIVATE] = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memory[1] = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE, private_file, 0);
    memory[2] = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, shared_file, 0);
    for (int i = 0; i < KINDS; i++)
        if (memory[i] == MAP_FAILED)
            return 1;
    printf("%p %p %p\n", (void *)memory[0], (void *)memory[1], (void *)memory[2]);
    fflush(stdout);
    for (uint64_t count = 1;; count++) {
        const uint64_t what = next_random() % 1000, kind = next_random() % KINDS, page = next_random() % PAGES;
        char *place = memory[kind] + page * PAGE_BYTES;
        if (what == 0)
            madvise(memory[PRIVATE] + page * PAGE_BYTES, PAGE_BYTES, MADV_DONTNEED);
        else if (what < 100)
            (void)*(volatile uint64_t *)place;
        else
            ((uint64_t *)place)[next_random() % (PAGE_BYTES / 8)] = count;
    }
}
