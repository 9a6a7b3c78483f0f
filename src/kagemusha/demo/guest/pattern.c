/* pattern SIZE_MB RATE_MB_S [PORT]: witness that no page of the guest's memory is lost, stale, torn or misplaced.
 *
 * Keeps a buffer of SIZE_MB, rewrites RATE_MB_S of it (whole pages, spread over the buffer) and reads it back all the
 * time. A page holds its own number, a generation that grows with each write, a checksum, and words that follow from
 * number and generation. The generation each page must have is kept apart from the pages: a page that was restored
 * from an older checkpoint than its neighbours is found although it is sound in itself.
 *
 * Prints "PATTERN-OK passes=N ..." once a second (a pass is one whole reading of the buffer) and, at the first fault,
 * "PATTERN-BAD ...", then ends with status 1.
 *
 * With PORT it can be asked: it says the newest of these lines to whoever connects to the TCP port (and closes; it
 * reads nothing), and answers each datagram to the UDP port with the datagram's first 8 bytes and the line. After a
 * fault it then stays, writes no more, and goes on saying PATTERN-BAD.
 */
#define _GNU_SOURCE
#include <inttypes.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PAGE_BYTES = 4096, WORDS = PAGE_BYTES / 8, MAGIC_WORD = 0, NUMBER, GENERATION, CHECKSUM, FIRST_FILL };
enum { PAGES_PER_MB = (1 << 20) / PAGE_BYTES, SLICE_MS = 5, CATCH_UP_NS = 50000000, MAX_READ_MB_S = 32 };
enum { NUMBER_BYTES = 8, LINE_BYTES = 160, TCP = 0, UDP, DOORS };
static const uint64_t MAGIC = UINT64_C(0x4b4147455041474d);

static struct pollfd doors[DOORS]; /* where it is asked; none without a port */
static int door_count;
static char bad[LINE_BYTES]; /* the first fault; empty: there was none */

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t next_word(uint64_t x)
{
    return x * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
}

static uint64_t page_seed(uint64_t number, uint64_t generation)
{
    return next_word(number ^ (generation << 32) ^ MAGIC);
}

static void write_page(uint64_t *page, uint64_t number, uint64_t generation)
{
    uint64_t x = page_seed(number, generation), sum = MAGIC + number + generation;
    page[MAGIC_WORD] = MAGIC;
    page[NUMBER] = number;
    page[GENERATION] = generation;
    for (int i = FIRST_FILL; i < WORDS; i++) {
        x = next_word(x);
        page[i] = x;
        sum += x;
    }
    page[CHECKSUM] = sum;
}

/* Of two faults the first counts: what follows may be its consequence. */
static void verify_page(const uint64_t *page, uint64_t number, uint64_t generation)
{
    uint64_t x = page_seed(number, generation), sum = MAGIC + page[NUMBER] + page[GENERATION], damage;
    const char *fault;
    damage = (page[MAGIC_WORD] ^ MAGIC) | (page[NUMBER] ^ number) | (page[GENERATION] ^ generation);
    for (int i = FIRST_FILL; i < WORDS; i++) {
        x = next_word(x);
        damage |= page[i] ^ x;
        sum += page[i];
    }
    if (!(damage | (page[CHECKSUM] ^ sum)) || bad[0])
        return;
    if (page[MAGIC_WORD] != MAGIC || page[CHECKSUM] != sum)
        fault = "damaged"; /* torn between two writes, zeroed, or foreign bytes */
    else
        fault = page[NUMBER] != number ? "misplaced" : "stale"; /* sound, but not what belongs here now */
    snprintf(bad, sizeof bad, "PATTERN-BAD fault=%s page=%" PRIu64 " generation=%" PRIu64 " found_page=%" PRIu64
             " found_generation=%" PRIu64 "\n", fault, number, generation, page[NUMBER], page[GENERATION]);
    fputs(bad, stdout);
    if (!door_count)
        exit(1);
}

static int open_doors(uint16_t port)
{
    const struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(port)};
    const int on = 1;
    for (int i = 0; i < DOORS; i++) {
        int fd = socket(AF_INET, (i == TCP ? SOCK_STREAM : SOCK_DGRAM) | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (fd < 0 || (i == TCP && setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on)) ||
            bind(fd, (const struct sockaddr *)&here, sizeof here) || (i == TCP && listen(fd, 16)))
            return -1;
        doors[i] = (struct pollfd){.fd = fd, .events = POLLIN};
    }
    door_count = DOORS;
    return 0;
}

/* A client that does not take its answer does not get it: nothing here waits. */
static void answer(const char *line)
{
    char packet[NUMBER_BYTES + LINE_BYTES];
    struct sockaddr_storage from;
    socklen_t size = sizeof from;
    ssize_t got;
    int fd;
    while ((fd = accept4(doors[TCP].fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        send(fd, line, strlen(line), MSG_NOSIGNAL);
        close(fd);
    }
    while ((got = recvfrom(doors[UDP].fd, packet, NUMBER_BYTES, MSG_TRUNC, (struct sockaddr *)&from, &size)) >= 0) {
        if (got >= NUMBER_BYTES) {
            memcpy(packet + NUMBER_BYTES, line, strlen(line));
            sendto(doors[UDP].fd, packet, NUMBER_BYTES + strlen(line), 0, (struct sockaddr *)&from, size);
        }
        size = sizeof from;
    }
}

/* A step through the buffer that visits every page once per round and keeps neighbours in time far apart. */
static uint64_t spread_step(uint64_t pages)
{
    uint64_t step = (uint64_t)((double)pages * 0.6180339887) | 1;
    for (;; step++) {
        uint64_t a = pages, b = step;
        while (b) {
            uint64_t rest = a % b;
            a = b;
            b = rest;
        }
        if (a == 1)
            return step;
    }
}

int main(int argc, char **argv)
{
    const long port = argc == 4 ? atol(argv[3]) : 0;
    if (argc < 3 || argc > 4 || atol(argv[1]) < 1 || atof(argv[2]) < 0 || (argc == 4 && (port < 1 || port > 65535))) {
        fprintf(stderr, "usage: pattern SIZE_MB RATE_MB_S [PORT]\n");
        return 2;
    }
    if (port && open_doors((uint16_t)port)) {
        perror("pattern: PORT");
        return 2;
    }
    const uint64_t pages = (uint64_t)atol(argv[1]) * PAGES_PER_MB, step = spread_step(pages);
    const double write_per_ns = atof(argv[2]) * PAGES_PER_MB / 1e9;
    /* One whole reading in four seconds, unless the buffer is so big that reading would be the guest's main load. */
    const double read_mb_s = (double)pages / PAGES_PER_MB / 4;
    const double read_per_ns = (read_mb_s < MAX_READ_MB_S ? read_mb_s : MAX_READ_MB_S) * PAGES_PER_MB / 1e9;
    uint64_t *buffer = mmap(NULL, pages * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint64_t *generations = calloc(pages, sizeof *generations);
    if (buffer == MAP_FAILED || !generations) {
        fprintf(stderr, "pattern: no memory for %s MB\n", argv[1]);
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (uint64_t i = 0; i < pages; i++)
        write_page(buffer + i * WORDS, i, 0);

    uint64_t writer = 0, reader = 0, passes = 0, written = 0, then = now_ns(), reported = then;
    double write_due = 0, read_due = 0;
    for (;;) {
        poll(doors, (nfds_t)door_count, SLICE_MS);
        uint64_t now = now_ns(), passed = now - then;
        then = now;
        /* After a long pause the rate goes on; what was missed is not made up in one burst. */
        if (passed > CATCH_UP_NS)
            passed = CATCH_UP_NS;
        write_due += (double)passed * write_per_ns;
        for (; write_due >= 1 && !bad[0]; write_due -= 1) {
            verify_page(buffer + writer * WORDS, writer, generations[writer]);
            if (bad[0])
                break; /* the evidence stays */
            write_page(buffer + writer * WORDS, writer, ++generations[writer]);
            writer = (writer + step) % pages;
            written++;
        }
        read_due += (double)passed * read_per_ns;
        for (; read_due >= 1; read_due -= 1) {
            verify_page(buffer + reader * WORDS, reader, generations[reader]);
            if (++reader == pages) {
                reader = 0;
                passes++;
            }
        }
        char line[LINE_BYTES];
        snprintf(line, sizeof line, "PATTERN-OK passes=%" PRIu64 " written_pages=%" PRIu64 "\n", passes, written);
        if (door_count)
            answer(bad[0] ? bad : line);
        if (now - reported >= 1000000000u) {
            reported = now;
            fputs(bad[0] ? bad : line, stdout);
        }
    }
}
