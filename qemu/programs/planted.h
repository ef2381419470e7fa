/* Small helpers shared by the programs that plant known state in the guest. */
#ifndef PLANTED_H
#define PLANTED_H

#include <fcntl.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#define CHECK(condition)                                                      \
	do {                                                                  \
		if (!(condition)) {                                           \
			perror(#condition);                                   \
			exit(1);                                              \
		}                                                             \
	} while (0)

/* Keeps the calling thread on one CPU, so that tests know where to look. */
static inline void pin_to_cpu(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	CHECK(sched_setaffinity(0, sizeof(set), &set) == 0);
}

static inline void name_thread(const char *name)
{
	CHECK(prctl(PR_SET_NAME, name) == 0);
}

/* The physical address behind a user address, 0 when no page is present. */
static inline uint64_t physical_address(const volatile void *virtual_address)
{
	uint64_t address = (uintptr_t)virtual_address, entry = 0;
	int pagemap = open("/proc/self/pagemap", O_RDONLY);

	CHECK(pagemap >= 0);
	CHECK(pread(pagemap, &entry, sizeof(entry), (off_t)(address / 4096 * 8)) ==
	      sizeof(entry));
	close(pagemap);
	if (!(entry >> 63))
		return 0;
	return (entry & ((1ull << 55) - 1)) * 4096 + address % 4096;
}

/* Tells init that everything this program plants is in place. */
static inline void planted(void)
{
	printf("planted=1\n");
	fflush(stdout);
}

#endif
