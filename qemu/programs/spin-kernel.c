/*
 * Busy in the kernel for ever: reading /proc/kallsyms again and again, so a
 * dump nearly always finds this CPU some frames deep in seq_read.
 */
#include "planted.h"

int main(int argc, char **argv)
{
	static char buffer[1 << 16];
	int cpu = argc > 1 ? atoi(argv[1]) : 2;
	int file = open("/proc/kallsyms", O_RDONLY);

	CHECK(file >= 0);
	name_thread("kstub-kspin");
	pin_to_cpu(cpu);
	printf("pid=%d\ncomm=kstub-kspin\ncpu=%d\n", getpid(), cpu);
	planted();
	for (;;) {
		if (read(file, buffer, sizeof(buffer)) <= 0)
			CHECK(lseek(file, 0, SEEK_SET) == 0);
	}
}
